"""Things are broken for real, and the alerts that are to tell of it fire, and fall silent again.

Minutes take a second here, in `for` and in ranges (tests/monitoring/prometheus.py).
"""

import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from services.contracts import topology
from tests.integration.conftest import Command, plain_connection, wait_until
from tests.integration.runs import context_of, end_well
from tests.monitoring.queries import rules
from tests.monitoring.system import System

SLOWLY = {"VLLM_TEST_CLAIM_SECONDS": "0.02"}
FIRED: set[str] = set()
"""What has fired so far; the last test looks at it."""


def fires(system: System, *alerts: str) -> None:
    wait_until(lambda: system.prometheus.firing() >= set(alerts), f"{alerts} firing")
    FIRED.update(alerts)


def falls_silent(system: System, *alerts: str) -> None:
    wait_until(lambda: not system.prometheus.firing() & set(alerts), f"{alerts} silent")


def verdicts(system: System) -> float:
    return system.prometheus.value("sum(keepwarm_store_verdicts_total)") or 0.0


def at_work(system: System, number: int = 1) -> list[Command]:
    """So many workers, each of which has begun."""
    workers = [system.worker(**SLOWLY) for _ in range(number)]
    for worker in workers:
        worker.said("worker.taking")
    before = verdicts(system)
    wait_until(lambda: verdicts(system) > before, "verdicts")
    return workers


@pytest.fixture
def worker(system: System) -> Iterator[Command]:
    """One that works on a run that is longer than the test."""
    (running,) = at_work(system)
    yield running
    end_well(running)


@pytest.fixture(scope="module")
def long_run(system: System) -> str:
    """Longer than all of this takes."""
    return system.submit(20_000)


@pytest.mark.usefixtures("long_run")
def test_while_all_is_well_nothing_fires(system: System) -> None:
    waiting = system.submit(8)
    workers = at_work(system, 2)
    # They share an engine, which does 50 a second: that is longer than the longest `for`, and than
    # the 20 minutes after which a run stands still. The second one waits its turn.
    before = verdicts(system)
    wait_until(lambda: verdicts(system) > before + 1_200, "more of them")
    assert system.prometheus.value(f'keepwarm_run_done_claims{{run_id="{waiting}"}}') == 0
    assert system.prometheus.firing() == set()
    end_well(*workers)


def test_every_worker_is_killed_while_claims_wait(system: System) -> None:
    for worker in at_work(system, 2):
        worker.signal(signal.SIGKILL)
    fires(system, "KeepwarmWorkerVanished")
    fires(system, "KeepwarmClaimsWait", "KeepwarmRunStalled")
    others = at_work(system, 2)
    falls_silent(system, "KeepwarmClaimsWait", "KeepwarmRunStalled", "KeepwarmWorkerVanished")
    end_well(*others)


def test_who_takes_messages_dies_with_them_again_and_again(system: System) -> None:
    worker = system.worker(**SLOWLY)
    worker.said("worker.taking")
    end_well(worker)
    queue = topology.claims_queue(context_of(worker))

    def die_with_them() -> bool:
        connection = plain_connection(system.node)
        channel = connection.channel()
        for _ in range(10):
            channel.basic_get(queue)
        connection.close()
        return "KeepwarmRedeliveryStorm" in system.prometheus.firing()

    wait_until(die_with_them, "KeepwarmRedeliveryStorm firing")
    FIRED.add("KeepwarmRedeliveryStorm")
    falls_silent(system, "KeepwarmRedeliveryStorm")


@pytest.mark.usefixtures("worker")
def test_the_broker_has_no_memory_left(system: System) -> None:
    system.node.control("set_vm_memory_high_watermark", "0.000001")
    fires(system, "KeepwarmBrokerAlarm")
    system.node.control("set_vm_memory_high_watermark", "0.4")
    falls_silent(system, "KeepwarmBrokerAlarm")


@pytest.mark.usefixtures("worker")
def test_messages_cannot_be_used(system: System) -> None:
    system.publish_nonsense()
    fires(system, "KeepwarmMessagesRefused")


@contextmanager
def broken(store: str) -> Iterator[None]:
    """Every transaction that writes a verdict fails, and may succeed later."""
    with closing(sqlite3.connect(store, timeout=30)) as database:
        database.execute(
            "CREATE TRIGGER broken BEFORE INSERT ON outcomes "
            "BEGIN INSERT INTO a_table_that_is_not_there VALUES (1); END"
        )
        try:
            yield
        finally:
            database.execute("DROP TRIGGER broken")


@pytest.mark.usefixtures("worker")
def test_the_store_takes_nothing(system: System) -> None:
    with broken(system.environment["KEEPWARM_STORE_URL"]):
        # Until it waits for the store, a collector sets nonsense aside as fast as it comes.
        waits = "max(keepwarm_store_waiting) == 1"
        wait_until(lambda: system.prometheus.value(waits), "a collector that waits")
        # More than a collector takes ahead, at once: workers would need minutes for so many.
        system.publish_nonsense(1_200)
        fires(system, "KeepwarmStoreLagging", "KeepwarmVerdictsWait")
    falls_silent(system, "KeepwarmStoreLagging", "KeepwarmVerdictsWait")


def test_claims_die(system: System, long_run: str) -> None:
    system.cancel(long_run)  # they would wait their turn behind it
    system.submit(400, long=40)
    worker = system.worker(**SLOWLY)
    fires(system, "KeepwarmDeadClaims")
    end_well(worker)


def test_engines_do_not_start(system: System) -> None:
    def fail() -> bool:
        failing = [system.worker(VLLM_TEST_FAULT="no-start") for _ in range(2)]
        assert {worker.wait() for worker in failing} == {4}
        return "KeepwarmColdStartLoop" in system.prometheus.firing()

    wait_until(fail, "KeepwarmColdStartLoop firing")
    FIRED.add("KeepwarmColdStartLoop")


def test_the_collector_stands_still(system: System) -> None:
    system.collecting.signal(signal.SIGSTOP)
    fires(system, "KeepwarmCollectorDown")
    system.collecting.signal(signal.SIGCONT)
    falls_silent(system, "KeepwarmCollectorDown")


def test_a_keeper_ends(system: System) -> None:
    end_well(system.keeping)
    fires(system, "KeepwarmTargetDown")


def test_each_alert_has_fired() -> None:
    assert {rule["alert"] for rule in rules()} == FIRED
