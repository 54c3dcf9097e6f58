import pytest

from services.contracts import ContextDemand, ContextSpec, ControlUpdate, decode, encode
from services.contracts.control import MAX_CANCELLED, MAX_CONTEXTS
from services.contracts.errors import MessageInvalid, MessageTooNew


def test_a_notice_may_have_nothing_to_say() -> None:
    assert decode(ControlUpdate, b"{}").cancelled == ()


def test_a_notice_holds_as_many_submissions_as_the_collector_tells_of_and_no_more() -> None:
    ids = tuple("s" * 250 + f"{number:06d}" for number in range(MAX_CANCELLED))
    assert decode(ControlUpdate, encode(ControlUpdate(cancelled=ids))).cancelled == ids
    body = encode(ControlUpdate(cancelled=ids)).replace(
        b'"cancelled":[', b'"cancelled":["one-more",'
    )
    with pytest.raises(MessageInvalid, match="not a Notice: cancelled: .*at most 1000"):
        decode(ControlUpdate, body)


def test_a_notice_of_a_later_keepwarm_is_not_half_understood() -> None:
    with pytest.raises(MessageTooNew, match="a Notice of version 99 came"):
        decode(ControlUpdate, b'{"schema_version": 99, "cancelled": [], "paused": true}')
    # This one's sender says that who does not know the field need not.
    assert decode(ControlUpdate, b'{"cancelled": ["s"], "hue": true}').cancelled == ("s",)


def demand(number: int) -> ContextDemand:
    return ContextDemand(
        context=ContextSpec(model=f"org/model-{number}"),
        claims_ready=number,
        claims_in_flight=0,
        workers_warm=0,
    )


def test_a_notice_holds_a_directory_of_contexts_of_bounded_length() -> None:
    directory = tuple(map(demand, range(MAX_CONTEXTS)))
    assert decode(ControlUpdate, encode(ControlUpdate(contexts=directory))).contexts == directory
    with pytest.raises(ValueError, match="at most 256"):
        ControlUpdate(contexts=(*directory, demand(MAX_CONTEXTS)))


def test_a_notice_of_before_the_directory_has_none() -> None:
    assert decode(ControlUpdate, b'{"cancelled": ["sub-1"]}').contexts == ()
