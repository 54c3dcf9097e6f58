"""Which dead messages may be sent back, and how people select them."""

import re
from pathlib import Path

import pytest

from services.broker import Delivery
from services.broker.dead_messages import reason, retry_error
from services.contracts import (
    ClaimBatch,
    ContextReady,
    DeadClaim,
    RunAnnouncement,
    VerdictBatch,
    decode,
)
from services.contracts.errors import MessageInvalid


def dead(kind: str, body: bytes) -> Delivery:
    return Delivery("dead-messages", body, {}, "m", False, 1, 1, kind=kind)


READY = (
    b'{"startup_id": "s", "worker_id": "w", "context_id": "ctx-1", "device": "d", "warm": true,'
    b' "seconds": 1, "phases": {}}'
)


def test_a_message_that_is_valid_for_a_queue_of_its_type_is_sent_back() -> None:
    assert retry_error(dead(ContextReady.wire_type, READY)) is None


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [
        (RunAnnouncement.wire_type, b"{}", "submit the file again"),
        (ClaimBatch.wire_type, b"{}", "not a valid ClaimBatch; `keepwarm dead drop` deletes it"),
        (VerdictBatch.wire_type, b"\xff", "not a valid VerdictBatch"),
        (DeadClaim.wire_type, READY, "not a valid DeadClaim"),
        (DeadClaim.wire_type, b'{"schema_version": 99}', "it is a newer DeadClaim"),
        ("runannouncement", READY, "has the type 'runannouncement', which no queue"),
        ("", READY, "has the type '', which no queue"),
    ],
)
def test_what_nobody_can_check_or_no_queue_accepts_is_not_sent_back(
    kind: str, body: bytes, error: str
) -> None:
    assert error in str(retry_error(dead(kind, body)))


def test_the_reasons_by_which_the_pages_select_messages_are_those_that_there_are(
    repository: Path,
) -> None:
    with pytest.raises(MessageInvalid) as refused:
        decode(ClaimBatch, b"{}")
    removed = {"x-death": [{"reason": "expired", "queue": "claims.ctx-1"}]}
    reasons = str(refused.value), reason(Delivery("dead-messages", b"", removed, "m", False, 1, 1))
    text = "\n".join(page.read_text() for page in sorted((repository / "docs").glob("*.md")))
    selected = re.findall(r'--reason\s+"([^"]+)"', text)
    assert len(selected) >= 2
    for each in selected:
        assert any(each in found for found in reasons), each
