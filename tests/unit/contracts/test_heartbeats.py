import json

import pytest

from services.contracts import WorkerHeartbeat, decode, encode
from services.contracts.errors import MessageInvalid
from services.contracts.heartbeats import HEARTBEAT_SECONDS, HEARTBEAT_TIMEOUT_SECONDS
from services.contracts.wire import Message


def test_a_worker_without_a_context_and_without_a_speed_can_say_so(
    messages: dict[str, Message],
) -> None:
    nothing = {"context_id": None, "claims_per_second": None, "state": "starting"}
    report = messages["WorkerReport"].model_copy(update=nothing)
    assert decode(WorkerHeartbeat, encode(report)) == report


@pytest.mark.parametrize("speed", ["-0.1", "NaN", "Infinity", "-Infinity", '"fast"'])
def test_a_speed_that_cannot_be_is_refused(speed: str, messages: dict[str, Message]) -> None:
    body = encode(messages["WorkerReport"])
    assert b'"claims_per_second":12.5' in body
    with pytest.raises(MessageInvalid, match="not a WorkerReport: claims_per_second: "):
        decode(WorkerHeartbeat, body.replace(b":12.5", f":{speed}".encode()))


def test_a_state_that_nobody_knows_is_refused(messages: dict[str, Message]) -> None:
    body = encode(messages["WorkerReport"])
    with pytest.raises(MessageInvalid, match="not a WorkerReport: state: "):
        decode(WorkerHeartbeat, body.replace(b'"serving"', b'"asleep"'))


def test_a_worker_is_not_forgotten_when_some_reports_are_late() -> None:
    assert HEARTBEAT_TIMEOUT_SECONDS >= 3 * HEARTBEAT_SECONDS


def test_a_report_of_an_older_worker_is_understood(messages: dict[str, Message]) -> None:
    body = (
        b'{"schema_version":1,"worker_id":"node-1","context_id":"ctx-1","device":"Tesla T4",'
        b'"state":"serving","claims_per_second":12.5}'
    )
    report = decode(WorkerHeartbeat, body)
    assert (report.host, report.job_id, report.metrics_address, report.ending) == (None,) * 4
    assert (report.batches_in_hand, report.walltime_left_seconds) == (0, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job_id", "71 3"),
        ("job_id", "x" * 65),
        ("walltime_left_seconds", -1),
        ("claims_in_hand", -1),
        ("ending", "bored"),
        ("restart_reason", "bored"),
        ("claims_answered", -1),
        ("metrics_address", "node:0"),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: object, messages: dict[str, Message]) -> None:
    fields = {**messages["WorkerReport"].model_dump(), field: value}
    with pytest.raises(MessageInvalid, match=f"not a WorkerReport: {field}: "):
        decode(WorkerHeartbeat, json.dumps(fields).encode())
