"""Which dead messages may be sent back."""

import pytest

from services.broker import Delivery
from services.broker.dead_messages import retry_error
from services.contracts import (
    ClaimBatch,
    ContextReady,
    DeadClaim,
    RunAnnouncement,
    VerdictBatch,
)


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
