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


class Line:
    """Stands for a publisher."""

    def __init__(self) -> None:
        self.readiness_error: str | None = None
        self.reports: list[WorkerHeartbeat] = []

    def offer(self, message: Outgoing) -> bool:
        assert message.transient
        if self.readiness_error is None:
            self.reports.append(decode(WorkerHeartbeat, message.body))
        return self.readiness_error is None


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> HeartbeatSender:
    """They are not due again, however slow this machine is."""
    monkeypatch.setattr("services.gpu_worker.heartbeat.HEARTBEAT_SECONDS", 600.0)
    post = WorkerPlacement("node-7", job_id="71_3", metrics_address="node-7:9464", ends_at=None)
    return HeartbeatSender(WorkerIdentity("node-7-1", "Tesla T4"), post)


def say(reports: HeartbeatSender, state: str, line: Line, status: dict[str, Any] = SERVING) -> None:
    reports.send_if_due(state, line, **status)  # type: ignore[arg-type]


def test_a_report_tells_where_the_worker_is_and_what_it_does(
    reports: HeartbeatSender, line: Line
) -> None:
    say(reports, "serving", line)
    (report,) = line.reports
    assert (report.worker_id, report.device, report.state) == ("node-7-1", "Tesla T4", "serving")
    assert (report.host, report.job_id, report.metrics_address) == (
        *("node-7", "71_3", "node-7:9464"),
    )
    assert (report.context_id, report.claims_per_second) == ("ctx-1", 12.5)
    assert (report.batches_in_hand, report.claims_in_hand) == (2, 90)
    assert report.walltime_left_seconds is None and report.ending is None


def test_a_change_is_told_at_once_and_what_is_the_same_not_again(
    reports: HeartbeatSender, line: Line
) -> None:
    for state in ("starting", "starting", "serving", "serving", "draining"):
        say(reports, state, line)
    say(reports, "draining", line, {})
    assert [report.state for report in line.reports] == [
        *("starting", "serving", "draining", "draining")
    ]


def test_what_is_the_same_is_told_again_when_it_is_due(
    reports: HeartbeatSender, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gpu_worker.heartbeat.HEARTBEAT_SECONDS", 0.0)
    for _ in range(3):
        say(reports, "serving", line)
    assert len(line.reports) == 3


def test_what_cannot_be_sent_now_is_told_when_it_can(reports: HeartbeatSender, line: Line) -> None:
    line.readiness_error = "no connection to the broker"
    say(reports, "serving", line)
    assert line.reports == []
    line.readiness_error = None
    say(reports, "serving", line)
    assert len(line.reports) == 1


def test_who_has_stopped_says_why_and_nothing_more(reports: HeartbeatSender, line: Line) -> None:
    reports.ending = "SIGUSR1"
    for state in ("stopped", "stopped", "serving"):
        say(reports, state, line, {})
    assert [(report.state, report.ending) for report in line.reports] == [("stopped", "SIGUSR1")]


def test_the_walltime_is_told_as_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    post = WorkerPlacement.detect(load_settings(walltime_seconds=3_600), None)
    assert post.seconds_left is not None and 3_500 < post.seconds_left <= 3_600
    assert WorkerPlacement("node", ends_at=0.0).seconds_left == 0.0
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert WorkerPlacement.detect(load_settings(), None).seconds_left is None
