"""Every query of every dashboard and of every alert rule, asked of a real Prometheus."""

import math
import signal
import time
from collections.abc import Callable, Set
from pathlib import Path

import pytest

from grafana.read import dashboards, substituted
from tests.conftest import DEMO_MODEL
from tests.integration.conftest import Command, wait_until
from tests.integration.runs import end_well
from tests.monitoring.prometheus import Prometheus
from tests.monitoring.queries import Query, panel_queries, rule_queries
from tests.monitoring.system import System, whole_system

STEP_SECONDS = 1.0
ENGINE_SECONDS = 300.0
ZERO_IS_WELL = {
    "rabbitmq_alarms_memory_used_watermark": "no alarm here; the tests of alerts have one",
    "rabbitmq_alarms_free_disk_space_watermark": "no alarm here",
    "keepwarm_broker_blocked": "no alarm here",
    "keepwarm_broker_reconnects_total": "the broker stays; test_metrics.py restarts one",
    "keepwarm_store_commit_failures_total": "the store is well here; the tests of alerts break it",
    "keepwarm_store_duplicate_verdicts_total": "a worker must die between publishing and settling",
    "keepwarm_run_duplicate_verdicts": "a worker must die between publishing and settling",
}
OF_LOSSES = (
    'keepwarm_preemptions_total{kind="vanished"}',
    "keepwarm_run_dead_claims",
    'keepwarm_run_verdicts{label="INVALID"}',
)
SLOWLY = {
    "VLLM_TEST_CLAIM_SECONDS": "0.05",
    "VLLM_TEST_START_SECONDS": "1",
    # A drain that has no time to finish what it has in hand.
    "KEEPWARM_GRACE_SECONDS": "1",
}


def told(system: System, series: str) -> float:
    return system.prometheus.value(f"sum({series})") or 0.0


def rises(system: System, *series: str) -> None:
    for each in series:
        wait_until(lambda each=each: told(system, each) > 0, each, ENGINE_SECONDS)


def lose_one(system: System, start: Callable[[], Command], run: str) -> Command:
    """A run in the midst of which one of two workers is killed; the other."""
    killed, left = start(), start()
    rises(system, f'keepwarm_run_done_claims{{run_id="{run}"}}')
    for worker in (killed, left):
        worker.said("worker.taking")
    busy = "count(keepwarm_batches_in_flight > 0) == count(keepwarm_batches_in_flight) > 1"
    rises(system, busy)
    killed.signal(signal.SIGKILL)
    system.publish_nonsense()
    return left


def drain_some(system: System, start: Callable[[], Command], first: Command) -> Command:
    """Workers drain, until one had something in hand that it did not finish; the next."""
    draining = first

    def returns_something() -> bool:
        nonlocal draining
        draining.said("worker.taking")
        end_well(draining)
        draining = start()
        return told(system, "keepwarm_store_returned_claims_total") > 0

    wait_until(returns_something, "that claims were returned")
    return draining


def assert_all_give_something(prometheus: Prometheus, since: float, may_be_zero: Set[str]) -> None:
    """As Grafana asks: what is by time over all of it, the rest now."""
    seconds = round(time.time() - since)
    variables = {
        "context": ".*",
        "run": ".*",
        "__rate_interval": "10s",
        "__range": f"{seconds}s",
    }
    known = prometheus.names()
    faults = []
    for query in panel_queries(variables):
        if missing := query.names() - known:
            faults.append(f"{query.where}: there is no {missing}")
            continue
        values = asked(prometheus, query, since)
        if not values:
            faults.append(f"{query.where}: nothing for {query.expression}")
        elif not any(values) and not query.names() <= may_be_zero:
            faults.append(f"{query.where}: only zeros for {query.expression}")
    for query in rule_queries():
        prometheus.query(query.expression)
        faults += [f"{query.where}: there is no {name}" for name in query.names() - known]
    assert not faults, "\n".join(faults)


def asked(prometheus: Prometheus, query: Query, since: float) -> list[float]:
    """Every number that it gives."""
    if query.instant:
        values = [each["value"] for each in prometheus.query(query.expression)]
    else:
        found = prometheus.query_range(query.expression, since, time.time(), STEP_SECONDS)
        values = [value for each in found for value in each["values"]]
    return [float(value) for _, value in values if not math.isnan(float(value))]


def assert_rules_are_well(prometheus: Prometheus) -> None:
    wait_until(
        lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"}, "rules that are asked"
    )


def assert_every_target_is_up(prometheus: Prometheus, workers: int) -> None:
    expected = {
        "keepwarm-collector": ["up"],
        "keepwarm-keepers": ["up"],
        "keepwarm-workers": ["up"] * workers,
        "prometheus": ["up"],
        "rabbitmq": ["up"],
        "rabbitmq-queues": ["up"],
    }
    seen: dict[str, list[str]] = {}

    def all_up() -> bool:
        nonlocal seen
        seen = prometheus.targets()
        return seen == expected

    try:
        wait_until(all_up, "every target up", ENGINE_SECONDS)
    except AssertionError as error:
        raise AssertionError(f"{error}; seen {seen}") from error


def test_every_query_names_what_there_is_and_gives_something(system: System) -> None:
    since = time.time()

    def start() -> Command:
        return system.worker(**SLOWLY)

    system.submit(24, unreadable=True)
    run = system.submit(20_000, long=3)
    other = system.worker("NVIDIA T4", **SLOWLY)
    left = drain_some(system, start, lose_one(system, start, run))
    rises(system, *OF_LOSSES, "keepwarm_run_returned_claims", "keepwarm_store_lost_claims_total")
    assert_every_target_is_up(system.prometheus, workers=2)
    assert_rules_are_well(system.prometheus)
    assert_all_give_something(system.prometheus, since, ZERO_IS_WELL.keys())
    devices = {
        each["metric"]["device"]
        for each in system.prometheus.query("sum by (device) (keepwarm_store_verdicts_total)")
    }
    assert len(devices) == 2 and "NVIDIA T4" in devices
    end_well(other, left)


def test_it_is_so_with_the_real_engine_too(tmp_path: Path) -> None:
    """What a worker has in hand when it is lost depends on the engine's speed here, so what was
    lost and returned may be 0.
    """
    since = time.time()
    with whole_system(tmp_path, DEMO_MODEL, real_engine=True) as system:
        system.submit(24, unreadable=True)
        run = system.submit(20_000, long=3)
        left = [lose_one(system, system.worker, run), system.worker()]
        rises(system, *OF_LOSSES, "keepwarm_warm_attaches_total")
        assert_every_target_is_up(system.prometheus, workers=2)
        of_losses = {
            "keepwarm_store_lost_claims_total",
            "keepwarm_run_lost_claims",
            "keepwarm_store_returned_claims_total",
            "keepwarm_run_returned_claims",
            "rabbitmq_global_messages_redelivered_total",
        }
        assert_all_give_something(system.prometheus, since, ZERO_IS_WELL.keys() | of_losses)
        end_well(*left)


def test_a_query_of_a_metric_that_is_gone_would_be_found(system: System) -> None:
    query = Query("here", "sum(rate(keepwarm_store_verdict_total[10s])) or vector(0)")
    assert query.names() - system.prometheus.names() == {"keepwarm_store_verdict_total"}


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda each: each["uid"])
def test_variables_have_values(dashboard: dict, system: System) -> None:
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "datasource":
            continue  # Grafana lists these itself
        series, label = variable["query"].removeprefix("label_values(")[:-1].rsplit(", ", 1)
        found = system.prometheus.query(f"last_over_time({substituted(series, ALL)}[1h])")
        assert found and all(label in each["metric"] for each in found), variable["name"]


ALL = {"context": ".*"}
