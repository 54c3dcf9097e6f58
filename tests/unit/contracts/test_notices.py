import pytest

from services.contracts import Notice, decode, encode
from services.contracts.errors import MessageInvalid
from services.contracts.notices import MAX_CANCELLED


def test_a_notice_may_have_nothing_to_say() -> None:
    assert decode(Notice, b"{}").cancelled == ()


def test_a_notice_holds_as_many_submissions_as_the_collector_tells_of_and_no_more() -> None:
    ids = tuple("s" * 250 + f"{number:06d}" for number in range(MAX_CANCELLED))
    assert decode(Notice, encode(Notice(cancelled=ids))).cancelled == ids
    body = encode(Notice(cancelled=ids)).replace(b'"cancelled":[', b'"cancelled":["one more",')
    with pytest.raises(MessageInvalid, match="not a Notice: cancelled: .*at most 1000"):
        decode(Notice, body)


def test_a_notice_of_a_later_keepwarm_is_not_half_understood() -> None:
    with pytest.raises(MessageInvalid, match="not a Notice: paused: "):
        decode(Notice, b'{"cancelled": [], "paused": true}')
