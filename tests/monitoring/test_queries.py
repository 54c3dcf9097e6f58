"""Every query of every dashboard and of every alert rule, asked of a real Prometheus."""

import math
import signal
import time
from collections.abc import Callable
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
    "keepwarm_context_in_flight_claims": "estimated from a queue as it was up to 4 s before",
    "rabbitmq_alarms_memory_used_watermark": "no alarm here; the tests of alerts have one",
    "rabbitmq_alarms_free_disk_space_watermark": "no alarm here",
    "keepwarm_broker_blocked": "no alarm here",
    "keepwarm_broker_reconnects_total": "the broker stays; test_metrics.py restarts one",
    "keepwarm_store_commit_failures_total": "the store is well here; the tests of alerts break it",
    "keepwarm_store_duplicate_verdicts_total": "a worker must die between publishing and settling",
    "keepwarm_run_duplicate_verdicts": "a worker must die between publishing and settling",
}
# A drain that has no time to finish what it has in hand.
NO_TIME = {"KEEPWARM_GRACE_SECONDS": "1"}
SLOWLY = {"VLLM_TEST_CLAIM_SECONDS": "0.05", "VLLM_TEST_START_SECONDS": "1", **NO_TIME}


def lose_workers(system: System, start: Callable[[], Command], run: str) -> list[Command]:
    """A run in the midst of which one worker is killed, and others drain; those that are left."""

    def told(series: str) -> float:
        return system.prometheus.value(f"sum({series})") or 0.0

    killed, drained = start(), start()
    done = f'keepwarm_run_done_claims{{run_id="{run}"}}'
    wait_until(lambda: told(done) > 0, "verdicts", ENGINE_SECONDS)
    killed.said("worker.taking")
    busy = "count(keepwarm_batches_in_hand > 1) == count(keepwarm_batches_in_hand) > 1"
    wait_until(lambda: told(busy) > 1, "batches in everyone's hands")
    system.publish_nonsense()
    killed.signal(signal.SIGKILL)

    def returns_something() -> bool:
        """One that drains may have nothing in hand just then."""
        nonlocal drained
        drained.said("worker.taking")
        end_well(drained)
        drained = start()
        return told("keepwarm_store_returned_claims_total") > 0

    wait_until(returns_something, "that claims were returned")
    for series in (
        'keepwarm_preemptions_total{kind="vanished"}',
        "keepwarm_store_lost_claims_total",
        "keepwarm_run_dead_claims",
        "keepwarm_run_returned_claims",
        'keepwarm_run_verdicts{label="INVALID"}',
    ):
        wait_until(lambda series=series: told(series) > 0, series)
    return [drained]


def assert_all_give_something(prometheus: Prometheus, since: float) -> None:
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
        elif not any(values) and not query.names() <= ZERO_IS_WELL.keys():
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
    wait_until(lambda: prometheus.targets() == expected, "every target up")


def test_every_query_names_what_there_is_and_gives_something(system: System) -> None:
    since = time.time()
    system.submit(24, unreadable=True)
    run = system.submit(4_000, long=3)
    other = system.worker("NVIDIA T4", **SLOWLY)
    left = lose_workers(system, lambda: system.worker(**SLOWLY), run)
    assert_every_target_is_up(system.prometheus, workers=2)
    assert_rules_are_well(system.prometheus)
    assert_all_give_something(system.prometheus, since)
    devices = {
        each["metric"]["device"]
        for each in system.prometheus.query("sum by (device) (keepwarm_store_verdicts_total)")
    }
    assert len(devices) == 2 and "NVIDIA T4" in devices
    end_well(other, *left)


def test_it_is_so_with_the_real_engine_too(tmp_path: Path) -> None:
    since = time.time()
    with whole_system(tmp_path, DEMO_MODEL, real_engine=True) as system:
        system.submit(24, unreadable=True)
        run = system.submit(1_500, long=3)
        left = lose_workers(system, lambda: system.worker(**NO_TIME), run)
        assert_every_target_is_up(system.prometheus, workers=1)
        assert_all_give_something(system.prometheus, since)
        end_well(*left)


def test_a_query_of_a_metric_that_is_gone_would_be_found(system: System) -> None:
    query = Query("here", "sum(rate(keepwarm_store_verdict_total[10s])) or vector(0)")
    assert query.names() - system.prometheus.names() == {"keepwarm_store_verdict_total"}


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda each: each["uid"])
def test_variables_have_values(dashboard: dict, system: System) -> None:
    for variable in dashboard["templating"]["list"]:
        series, label = variable["query"].removeprefix("label_values(")[:-1].rsplit(", ", 1)
        found = system.prometheus.query(f"last_over_time({substituted(series, ALL)}[1h])")
        assert found and all(label in each["metric"] for each in found), variable["name"]


ALL = {"context": ".*"}
