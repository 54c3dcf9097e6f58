"""What heartbeats a worker sends, and when."""

from typing import Any

import pytest

from services.broker import Outgoing
from services.contracts import WorkerHeartbeat, decode, load_settings
from services.gpu_worker.heartbeat import HeartbeatSender, WorkerPlacement
from services.gpu_worker.in_flight import WorkerIdentity

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


@pytest.fixture
def heartbeats(monkeypatch: pytest.MonkeyPatch) -> HeartbeatSender:
    """They are not due again, however slow this machine is."""
    monkeypatch.setattr("services.gpu_worker.heartbeat.HEARTBEAT_SECONDS", 600.0)
    placement = WorkerPlacement(
        "node-7", job_id="71_3", metrics_address="node-7:9464", ends_at=None
    )
    return HeartbeatSender(WorkerIdentity("node-7-1", "Tesla T4"), placement)


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


def test_an_unchanged_state_is_sent_again_when_it_is_due(
    heartbeats: HeartbeatSender, publisher: FakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gpu_worker.heartbeat.HEARTBEAT_SECONDS", 0.0)
    for _ in range(3):
        send(heartbeats, "serving", publisher)
    assert len(publisher.heartbeats) == 3


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
