"""Who is there, by a clock that the tests move."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from services.collector.fleet import Fleet
from services.contracts.heartbeats import HEARTBEAT_SECONDS, HEARTBEAT_TIMEOUT_SECONDS
from tests.unit.clock import Clock


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    return Fleet(clock)


def test_workers_are_counted_on_the_context_that_they_serve(
    fleet: Fleet, make: SimpleNamespace
) -> None:
    for worker, context in [("a", "ctx-1"), ("b", "ctx-1"), ("c", "ctx-2")]:
        fleet.note(make.report(worker, context_id=context))
    assert [fleet.workers_on(each) for each in ("ctx-1", "ctx-2", "ctx-3")] == [2, 1, 0]


@pytest.mark.parametrize(
    "changes",
    [{"state": "starting"}, {"state": "draining"}, {"state": "stopped"}, {"context_id": None}],
)
def test_one_that_serves_nothing_any_more_is_counted_no_more(
    changes: dict[str, object], fleet: Fleet, make: SimpleNamespace
) -> None:
    fleet.note(make.report("a", context_id="ctx-1"))
    fleet.note(make.report("b", context_id="ctx-1"))
    fleet.note(make.report("a", **{"context_id": "ctx-1", **changes}))
    assert fleet.workers_on("ctx-1") == 1


def test_a_workers_latest_heartbeat_is_known_until_it_stops(
    fleet: Fleet, make: SimpleNamespace
) -> None:
    fleet.note(make.report("a", claims_answered=1))
    fleet.note(make.report("a", claims_answered=2))
    known = fleet.worker("a")
    assert known is not None and known.claims_answered == 2 and fleet.worker("b") is None
    fleet.note(make.report("a", state="stopped"))
    assert fleet.worker("a") is None


def test_only_the_latest_heartbeat_of_a_worker_counts(fleet: Fleet, make: SimpleNamespace) -> None:
    for context in ("ctx-1", "ctx-1", "ctx-2"):
        fleet.note(make.report("a", context_id=context))
    assert (fleet.workers_on("ctx-1"), fleet.workers_on("ctx-2")) == (0, 1)


def test_who_was_silent_for_too_long_is_gone_and_who_reports_again_is_back(
    fleet: Fleet, clock: Clock, make: SimpleNamespace
) -> None:
    report_a, report_b = make.report("a", context_id="ctx-1"), make.report("b", context_id="ctx-1")
    fleet.note(report_a)
    fleet.note(report_b)
    clock.now += HEARTBEAT_TIMEOUT_SECONDS / 2
    fleet.note(report_a)
    clock.now += HEARTBEAT_TIMEOUT_SECONDS / 2 - 0.1
    assert fleet.workers_on("ctx-1") == 2
    clock.now += 0.1
    assert fleet.workers_on("ctx-1") == 1
    fleet.note(report_b)
    assert fleet.workers_on("ctx-1") == 2
    clock.now += HEARTBEAT_TIMEOUT_SECONDS
    assert fleet.workers_on("ctx-1") == 0


def test_of_too_many_workers_those_that_were_silent_for_longest_are_forgotten(
    fleet: Fleet, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.collector.fleet.MAX_WORKERS", 3)
    for worker in "abcade":  # `a` again: `b` and `c` are then the longest silent
        fleet.note(make.report(worker, context_id=f"ctx-{worker}"))
    assert [worker for worker in "abcde" if fleet.workers_on(f"ctx-{worker}")] == ["a", "d", "e"]


def test_nothing_is_kept_of_those_that_are_gone(fleet: Fleet, make: SimpleNamespace) -> None:
    for number in range(100):
        fleet.note(make.report("a", context_id=f"ctx-{number}"))
    fleet.note(make.report("a", state="stopped"))
    assert (fleet._workers, fleet._serving) == ({}, {})


def test_a_new_listener_has_heard_from_all_after_one_heartbeat_interval(
    fleet: Fleet, clock: Clock
) -> None:
    clock.now += 10  # a collector may be made long before it is connected
    assert not fleet.heard_from_all()
    clock.now += HEARTBEAT_SECONDS - 0.1
    assert not fleet.heard_from_all()
    clock.now += 0.1
    assert fleet.heard_from_all()


def test_who_did_not_listen_for_a_while_begins_anew(fleet: Fleet, clock: Clock) -> None:
    fleet.heard_from_all()
    clock.now += HEARTBEAT_TIMEOUT_SECONDS - HEARTBEAT_SECONDS  # nobody is forgotten
    assert fleet.heard_from_all()
    clock.now += HEARTBEAT_TIMEOUT_SECONDS
    assert not fleet.heard_from_all()
    clock.now += HEARTBEAT_SECONDS
    assert fleet.heard_from_all()


# Who is there, and who went.


def preempted(kind: str) -> float:
    return REGISTRY.get_sample_value("keepwarm_preemptions_total", {"kind": kind}) or 0.0


@pytest.fixture
def preemptions() -> Callable[[], dict[str, float]]:
    """How many there were since, by kind."""
    kinds = ("SIGTERM", "SIGUSR1", "walltime", "failure", "vanished")
    before = {kind: preempted(kind) for kind in kinds}
    return lambda: {k: n for k in kinds if (n := preempted(k) - before[k])}


def test_every_worker_that_is_not_gone_is_there(fleet: Fleet, make: SimpleNamespace) -> None:
    reports = [make.report(state, state=state) for state in ("idle", "starting", "serving")]
    for report in (*reports, make.report("gone", state="stopped")):
        fleet.note(report)
    assert fleet.workers() == reports


def test_a_worker_that_goes_is_counted_once_by_its_reason(
    fleet: Fleet, make: SimpleNamespace, preemptions: Callable[[], dict[str, float]]
) -> None:
    fleet.note(make.report("a"))
    for state in ("serving", "draining", "stopped"):
        fleet.note(make.report("a", state=state, ending="SIGUSR1"))
    fleet.note(make.report("b", state="stopped", ending="walltime"))
    assert preemptions() == {"SIGUSR1": 1, "walltime": 1}


def test_a_worker_that_falls_silent_has_vanished(
    fleet: Fleet,
    make: SimpleNamespace,
    clock: Clock,
    preemptions: Callable[[], dict[str, float]],
) -> None:
    fleet.note(make.report("a"))
    fleet.note(make.report("b", state="draining", ending="SIGTERM"))
    for _ in range(8):
        clock.now += HEARTBEAT_SECONDS
        fleet.heard_from_all()
    assert fleet.workers() == []
    assert preemptions() == {"SIGTERM": 1, "vanished": 1}


def test_missing_heartbeats_while_disconnected_do_not_count(
    fleet: Fleet,
    make: SimpleNamespace,
    clock: Clock,
    preemptions: Callable[[], dict[str, float]],
) -> None:
    fleet.note(make.report("a"))
    for _ in range(10):
        clock.now += HEARTBEAT_SECONDS
        fleet.note_disconnected()
        fleet.heard_from_all()
    assert [report.worker_id for report in fleet.workers()] == ["a"]
    for _ in range(3):
        clock.now += HEARTBEAT_SECONDS
        assert fleet.workers()
        fleet.heard_from_all()
    clock.now += HEARTBEAT_SECONDS
    assert fleet.workers() == []
    assert preemptions() == {"vanished": 1}


def test_a_silence_while_nobody_listened_is_nobodys(
    fleet: Fleet,
    make: SimpleNamespace,
    clock: Clock,
    preemptions: Callable[[], dict[str, float]],
) -> None:
    fleet.note(make.report("a"))
    clock.now += 10 * HEARTBEAT_TIMEOUT_SECONDS
    fleet.heard_from_all()
    assert (fleet.workers(), preemptions()) == ([], {})
