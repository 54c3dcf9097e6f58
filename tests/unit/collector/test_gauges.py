"""How things stand, as a scrape reads it from a store."""

import time
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from services.collector.demand import DemandEstimator
from services.collector.fleet import Fleet
from services.collector.gauges import Gauges, RunsSnapshot
from services.collector.metrics import count_commit
from services.contracts import Run, load_settings, topology
from services.store import Store

VERDICTS = "keepwarm_run_verdicts"


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def registry(store: Store, fleet: Fleet) -> CollectorRegistry:
    """At each scrape, what the store has then."""
    made = CollectorRegistry()
    demand = DemandEstimator(store, load_settings(), fleet)
    demand._counts = {topology.VERDICTS_QUEUE: 3, "claims.ctx-1": 9}
    made.register(Gauges(fleet, demand, lambda: RunsSnapshot.read(store)))
    return made


def scraped(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """By the values of its labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_a_runs_gauges_are_those_of_the_store(
    registry: CollectorRegistry, store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.batch(make.verdict(0), make.verdict(1))))
    assert scraped(registry, "keepwarm_run_done_claims") == {(run.run_id,): 2}
    assert scraped(registry, "keepwarm_run_claims") == {}  # not all are sent
    store.write(make.incoming(make.announced(claims=3, rejected=4), make.dead(2)))
    expected = {
        "keepwarm_run_claims": 3,
        "keepwarm_run_done_claims": 2,
        "keepwarm_run_dead_claims": 1,
        "keepwarm_run_rejected_lines": 4,
        "keepwarm_run_complete": 1,
        "keepwarm_run_cancelled": 0,
    }
    assert {name: scraped(registry, name) for name in expected} == {
        name: {(run.run_id,): value} for name, value in expected.items()
    }
    info = scraped(registry, "keepwarm_run_info")
    context_id = run.context.context_id
    assert info == {(run.run_id, context_id, "claims.jsonl", "models/small", "abc"): 1}


def test_a_runs_verdicts_are_exported_by_label_and_correctness(
    registry: CollectorRegistry, store: Store, make: SimpleNamespace, run: Run
) -> None:
    verdicts = (make.verdict(0, gold="A"), make.verdict(1, "C", gold="A"), make.verdict(2))
    store.write(make.incoming(make.announced(), make.batch(*verdicts)))
    by_label = {label: number for (_, label), number in scraped(registry, VERDICTS).items()}
    assert by_label == {"A": 2, "B B": 0, "C": 1, "INVALID": 0}
    assert scraped(registry, "keepwarm_run_gold_verdicts") == {
        (run.run_id, "true"): 1,
        (run.run_id, "false"): 1,
    }


def test_labels_that_workers_invent_do_not_make_a_series_each(
    registry: CollectorRegistry, store: Store, make: SimpleNamespace, run: Run
) -> None:
    verdicts = (make.verdict(n, f"L{n:03}") for n in range(100))
    store.write(make.incoming(make.announced(), make.batch(*verdicts)))
    told = scraped(registry, VERDICTS)
    # 64, of which the prompt's own come first.
    assert len(told) == 65 and told[run.run_id, "other"] == 40
    assert sum(told.values()) == 100


def test_runs_that_are_not_complete_come_first_and_the_oldest_complete_ones_are_left_out(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    others = [run.model_copy(update={"source_digest": f"src-{number}"}) for number in range(25)]
    store.write(make.incoming(make.announced(claims=1)))
    for other in others:
        store.write(
            make.incoming(make.announced(claims=1, of=other), make.batch(make.verdict(0), of=other))
        )
    shown = [status.run_id for status in RunsSnapshot.read(store).statuses]
    assert shown == [run.run_id, *(other.run_id for other in others[:-20:-1])]


def test_the_age_of_a_runs_gauges_is_a_gauge(store: Store, fleet: Fleet) -> None:
    registry = CollectorRegistry()
    demand = DemandEstimator(store, load_settings(), fleet)
    snapshot = RunsSnapshot(read_at=time.monotonic() - 60)
    registry.register(Gauges(fleet, demand, lambda: snapshot))
    (age,) = scraped(registry, "keepwarm_run_counts_age_seconds").values()
    assert age >= 60


def test_workers_are_counted_by_state_and_device(
    registry: CollectorRegistry, fleet: Fleet, make: SimpleNamespace
) -> None:
    for worker, changes in {
        "a": {"claims_per_second": 10.0},
        "b": {"claims_per_second": 5.0},
        "c": {"state": "starting", "device": "H100", "claims_per_second": 99.0},
    }.items():
        fleet.note(make.report(worker, **changes))
    assert scraped(registry, "keepwarm_workers") == {
        ("serving", "Tesla T4"): 2,
        ("starting", "H100"): 1,
    }
    assert scraped(registry, "keepwarm_workers_claims_per_second") == {("Tesla T4",): 15.0}


def test_devices_that_workers_invent_do_not_make_a_series_each(
    registry: CollectorRegistry, fleet: Fleet, make: SimpleNamespace
) -> None:
    for number in range(500):
        fleet.note(make.report(f"w-{number}", device=f"GPU {number}"))
    workers = scraped(registry, "keepwarm_workers")
    assert len(workers) == 65 and workers["serving", "other"] == 436


def test_only_core_queues_are_exported(registry: CollectorRegistry) -> None:
    assert scraped(registry, "keepwarm_queue_messages") == {("verdicts",): 3}


def test_texts_from_messages_cannot_break_the_format(
    registry: CollectorRegistry, fleet: Fleet, make: SimpleNamespace
) -> None:
    fleet.note(make.report("a", device='T4"} 1\nkeepwarm_workers{x="\\'))
    text = generate_latest(registry).decode()
    (line,) = (line for line in text.splitlines() if line.startswith("keepwarm_workers{"))
    device = 'T4\\"} 1\\nkeepwarm_workers{x=\\"\\\\'
    assert line == f'keepwarm_workers{{device="{device}",state="serving"}} 1.0'


def test_what_was_committed_is_counted(make: SimpleNamespace) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"keepwarm_{name}", labels) or 0.0

    def all_values() -> list[float]:
        return [
            value("store_verdicts_total", device="counted", label="A"),
            value("store_verdicts_total", device="counted", label="INVALID"),
            value("store_gold_verdicts_total", correct="true"),
            value("store_gold_verdicts_total", correct="false"),
            value("store_duplicate_verdicts_total"),
            value("store_lost_claims_total"),
            value("store_dead_claims_total", reason="too-long"),
            value("store_returned_claims_total"),
            value("warm_attaches_total"),
            value("cold_start_seconds_count", phase="load"),
            value("cold_start_seconds_count", phase="fetch"),
        ]

    before = all_values()
    count_commit(
        make.incoming(
            make.batch(
                *(make.verdict(0), make.verdict(1, gold="A"), make.verdict(2, "INVALID", gold="A")),
                device="counted",
                attempt=2,
            ),
            make.dead(3),
            make.returned(4, 5),
            make.ready("s-1", warm=True),
            make.ready("s-2", phases={"load": 2.0, "total": 3.0}),
        ),
        fresh=2,
    )
    gained = [after - first for after, first in zip(all_values(), before, strict=True)]
    assert gained == [2, 1, 1, 1, 1, 3, 1, 2, 1, 1, 0]
