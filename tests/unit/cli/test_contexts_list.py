"""What `keepwarm contexts list` shows."""

import time

import pytest

from services.cli.contexts import _description
from services.contexts.protocol import ContextRecord
from services.contracts import ContextSpec


@pytest.mark.parametrize(("attached", "last"), [(0, "the last 2 h ago"), (1, "the last now")])
def test_an_engine_in_use_was_last_used_now(attached: int, last: str, context: ContextSpec) -> None:
    came = time.monotonic() - 7_200
    record = ContextRecord(
        name="ctx-0011-2233",
        context=context,
        device="Xeon",
        state="warm",
        socket="",
        log="",
        since=came,
        last_used=came,
        attached=attached,
        used=3,
    )
    assert f"{attached} workers now; used 3 times, {last}" in _description(record)
