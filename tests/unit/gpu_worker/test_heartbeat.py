"""What heartbeats a worker sends, and when."""

from typing import Any

import pytest

from services.broker import Outgoing
from services.contracts import WorkerHeartbeat, decode, encode, load_settings
from services.contracts.heartbeats import HEARTBEAT_SECONDS
from services.gpu_worker.heartbeat import HeartbeatSender, WorkerPlacement
from services.gpu_worker.in_flight import WorkerIdentity
from tests.unit.clock import Clock

SERVING = {
    "context_id": "ctx-1",
    "claims_per_second": 12.5,
    "batches_in_flight": 2,
    "claims_in_flight": 90,
}


class FakePublisher:
    """Records the heartbeats that it is offered, unless it has a `readiness_error`."""

    def __init__(self) -> None:
        self.readiness_error: str | None = None
        self.heartbeats: list[WorkerHeartbeat] = []

    def offer(self, message: Outgoing) -> bool:
        assert message.transient
        if self.readiness_error is None:
            self.heartbeats.append(decode(WorkerHeartbeat, message.body))
        return self.readiness_error is None


@pytest.fixture
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("services.gpu_worker.heartbeat.time.monotonic", clock)
    return clock


IDENTITY = WorkerIdentity("node-7-1", "Tesla T4")
PLACEMENT = WorkerPlacement("node-7", job_id="71_3", metrics_address="node-7:9464", ends_at=None)


@pytest.fixture
def heartbeats() -> HeartbeatSender:
    return HeartbeatSender(IDENTITY, PLACEMENT)


def send(
    heartbeats: HeartbeatSender,
    state: str,
    publisher: FakePublisher,
    status: dict[str, Any] = SERVING,
) -> None:
    heartbeats.send_if_due(state, publisher, **status)  # type: ignore[arg-type]


def test_a_heartbeat_has_the_workers_placement_state_and_load(
    heartbeats: HeartbeatSender, publisher: FakePublisher
) -> None:
    send(heartbeats, "serving", publisher)
    (heartbeat,) = publisher.heartbeats
    assert (heartbeat.worker_id, heartbeat.device, heartbeat.state) == (
        "node-7-1",
        "Tesla T4",
        "serving",
    )
    assert (heartbeat.host, heartbeat.job_id, heartbeat.metrics_address) == (
        *("node-7", "71_3", "node-7:9464"),
    )
    assert (heartbeat.context_id, heartbeat.claims_per_second) == ("ctx-1", 12.5)
    assert (heartbeat.batches_in_hand, heartbeat.claims_in_hand) == (2, 90)
    assert heartbeat.walltime_left_seconds is None and heartbeat.ending is None


def test_a_change_is_sent_at_once_and_an_unchanged_state_is_not_sent_again(
    heartbeats: HeartbeatSender, publisher: FakePublisher
) -> None:
    for state in ("starting", "starting", "serving", "serving", "draining"):
        send(heartbeats, state, publisher)
    send(heartbeats, "draining", publisher, {})
    assert [heartbeat.state for heartbeat in publisher.heartbeats] == [
        *("starting", "serving", "draining", "draining")
    ]


def test_the_reason_for_a_restart_is_sent_at_once(
    heartbeats: HeartbeatSender, publisher: FakePublisher
) -> None:
    for reason in (None, "engine-ended", "out-of-memory", "out-of-memory"):
        send(heartbeats, "starting", publisher, {"restart_reason": reason})
    reasons = [heartbeat.restart_reason for heartbeat in publisher.heartbeats]
    assert reasons == [None, "engine-ended", "out-of-memory"]


def test_an_unchanged_state_is_sent_again_when_it_is_due(
    heartbeats: HeartbeatSender, publisher: FakePublisher, clock: Clock
) -> None:
    for _ in range(3):
        send(heartbeats, "serving", publisher)
        clock.now += HEARTBEAT_SECONDS - 0.1
        send(heartbeats, "serving", publisher)
        clock.now += 0.1
    assert len(publisher.heartbeats) == 3


def test_a_worker_of_a_run_reports_each_progress_but_not_too_often(
    publisher: FakePublisher, clock: Clock
) -> None:
    heartbeats = HeartbeatSender(IDENTITY, PLACEMENT, watched=True)
    for pause, answers in ((0.0, 0), (0.1, 1), (0.1, 1), (0.1, 1), (0.1, 0), (0.2, 0)):
        clock.now += pause
        for _ in range(answers):
            heartbeats.count_answer()
        send(heartbeats, "serving", publisher)
    assert [heartbeat.claims_answered for heartbeat in publisher.heartbeats] == [0, 2, 3]


def test_other_workers_send_no_more_and_no_larger_heartbeats_for_their_progress(
    heartbeats: HeartbeatSender, publisher: FakePublisher, clock: Clock
) -> None:
    for _ in range(10):
        clock.now += HEARTBEAT_SECONDS / 10
        heartbeats.count_answer()
        send(heartbeats, "serving", publisher)
    assert len(publisher.heartbeats) == 1
    assert b"answered" not in encode(publisher.heartbeats[0])


def test_a_heartbeat_that_the_broker_does_not_accept_is_sent_when_it_does(
    heartbeats: HeartbeatSender, publisher: FakePublisher
) -> None:
    publisher.readiness_error = "no connection to the broker"
    send(heartbeats, "serving", publisher)
    assert publisher.heartbeats == []
    publisher.readiness_error = None
    send(heartbeats, "serving", publisher)
    assert len(publisher.heartbeats) == 1


def test_the_last_heartbeat_has_the_reason_and_none_follows_it(
    heartbeats: HeartbeatSender, publisher: FakePublisher
) -> None:
    heartbeats.ending = "SIGUSR1"
    for state in ("stopped", "stopped", "serving"):
        send(heartbeats, state, publisher, {})
    assert [(heartbeat.state, heartbeat.ending) for heartbeat in publisher.heartbeats] == [
        ("stopped", "SIGUSR1")
    ]


def test_the_walltime_is_reported_as_the_seconds_left(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = WorkerPlacement.detect(load_settings(walltime_seconds=3_600), None)
    assert placement.seconds_left is not None and 3_500 < placement.seconds_left <= 3_600
    assert WorkerPlacement("node", ends_at=0.0).seconds_left == 0.0
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert WorkerPlacement.detect(load_settings(), None).seconds_left is None
