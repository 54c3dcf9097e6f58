import pytest

from services.contracts import ContextReady, StartupPhases, decode, encode
from services.contracts.errors import MessageInvalid
from services.contracts.wire import Message


def test_a_phase_that_was_not_measured_is_none(messages: dict[str, Message]) -> None:
    ready = messages["ContextReady"].model_copy(update={"phases": StartupPhases(load=9.5)})
    assert decode(ContextReady, encode(ready)).phases == StartupPhases(load=9.5)
    assert StartupPhases(load=9.5).compile is None


@pytest.mark.parametrize("seconds", ["-0.1", "NaN", "Infinity", "1e12"])
def test_a_time_that_cannot_be_is_refused(seconds: str, messages: dict[str, Message]) -> None:
    body = encode(messages["ContextReady"])
    assert b'"seconds":61.5' in body
    with pytest.raises(MessageInvalid, match="not a ContextReady: "):
        decode(ContextReady, body.replace(b'"seconds":61.5', f'"seconds":{seconds}'.encode()))
