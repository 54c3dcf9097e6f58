import pytest

from services.contracts import WorkerReport, decode, encode
from services.contracts.errors import MessageInvalid
from services.contracts.presence import FORGOTTEN_SECONDS, REPORT_SECONDS
from services.contracts.wire import Message


def test_a_worker_without_a_context_and_without_a_speed_can_say_so(
    messages: dict[str, Message],
) -> None:
    nothing = {"context_id": None, "claims_per_second": None, "state": "starting"}
    report = messages["WorkerReport"].model_copy(update=nothing)
    assert decode(WorkerReport, encode(report)) == report


@pytest.mark.parametrize("speed", ["-0.1", "NaN", "Infinity", "-Infinity", '"fast"'])
def test_a_speed_that_cannot_be_is_refused(speed: str, messages: dict[str, Message]) -> None:
    body = encode(messages["WorkerReport"])
    assert b'"claims_per_second":12.5' in body
    with pytest.raises(MessageInvalid, match="not a WorkerReport: claims_per_second: "):
        decode(WorkerReport, body.replace(b":12.5", f":{speed}".encode()))


def test_a_state_that_nobody_knows_is_refused(messages: dict[str, Message]) -> None:
    body = encode(messages["WorkerReport"])
    with pytest.raises(MessageInvalid, match="not a WorkerReport: state: "):
        decode(WorkerReport, body.replace(b'"serving"', b'"asleep"'))


def test_a_worker_is_not_forgotten_when_some_reports_are_late() -> None:
    assert FORGOTTEN_SECONDS >= 3 * REPORT_SECONDS
