"""A delivery, and a consumer that no broker is needed for; the rest is shown on a real one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.broker import Consumer, Delivery
from services.contracts import ControlUpdate, encode, topology
from services.contracts.errors import MessageInvalid
from tests.unit.broker.conftest import unopened


def delivery(headers: dict[str, object] | None = None, **changes: Any) -> Delivery:
    fields: dict[str, Any] = {
        "queue": "claims.x",
        "body": b"",
        "headers": headers or {},
        "message_id": "m-1",
        "redelivered": bool(headers),
        "tag": 1,
        "epoch": 1,
    }
    return Delivery(**{**fields, **changes})


@pytest.mark.parametrize(
    ("headers", "attempt"),
    [
        ({}, 1),
        ({"x-delivery-count": 0}, 1),
        ({"x-delivery-count": 3}, 4),
        ({"other": 9}, 1),
        # RabbitMQ 4.3: returned three times, one of them by a worker that was killed.
        ({"x-delivery-count": 1, "x-acquired-count": 3}, 4),
        ({"x-acquired-count": 2}, 3),
        ({"x-acquired-count": "many", "x-delivery-count": 2}, 3),
        ({"x-acquired-count": -1, "x-delivery-count": None}, 1),
    ],
)
def test_the_attempt_is_one_more_than_the_earlier_deliveries(
    headers: dict[str, object], attempt: int
) -> None:
    assert delivery(headers).attempt == attempt


# What it holds.


def test_a_delivery_of_the_right_type_is_the_message_that_it_holds() -> None:
    notice = ControlUpdate(cancelled=("sub-1",))
    assert delivery(body=encode(notice), kind="Notice").message(ControlUpdate) == notice


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "ClaimBatch"}, "its type is 'ClaimBatch', not Notice"),
        ({"kind": ""}, "its type is '', not Notice"),
        ({"content_type": "text/plain"}, "its content type is 'text/plain', not application/json"),
        ({"content_type": ""}, "its content type is '', not"),
        ({"body": b"{"}, "not a Notice: Invalid JSON"),
    ],
)
def test_a_delivery_of_another_type_is_not_even_decoded(changes: dict[str, Any], why: str) -> None:
    fields = {"kind": "Notice", "body": encode(ControlUpdate()), **changes}
    with pytest.raises(MessageInvalid, match=why):
        delivery(**fields).message(ControlUpdate)


@pytest.mark.parametrize(("headers", "failures"), [({}, 0), ({topology.FAILURES_HEADER: 3}, 3)])
def test_a_delivery_has_the_failures_that_its_claims_were_part_of(
    headers: dict[str, object], failures: int
) -> None:
    assert delivery(headers).failures == failures


@given(st.integers() | st.text() | st.none() | st.floats() | st.binary() | st.lists(st.integers()))
def test_a_count_of_failures_is_a_count_or_refused(value: object) -> None:
    made = delivery({topology.FAILURES_HEADER: value})
    try:
        assert 0 <= made.failures < 2**31
    except MessageInvalid as error:
        assert topology.FAILURES_HEADER in str(error)


@given(
    st.integers()
    | st.none()
    | st.dictionaries(st.text(), st.integers())
    | st.lists(st.integers() | st.text(max_size=300), max_size=70)
)
def test_the_engines_that_could_not_answer_are_a_bounded_list_of_names_or_refused(
    value: object,
) -> None:
    made = delivery({topology.DECLINED_HEADER: value, topology.WAITED_HEADER: 5})
    try:
        assert list(made.declined) == value
        assert len(made.declined) <= 64 and all(len(entry) <= 256 for entry in made.declined)
    except MessageInvalid as error:
        assert topology.DECLINED_HEADER in str(error)
    assert made.waited_seconds == 5


def test_what_happened_to_claims_travels_in_headers_that_only_those_have_who_need_them() -> None:
    assert delivery({}).history == {topology.FAILURES_HEADER: 0}
    headers = {
        topology.FAILURES_HEADER: 2,
        topology.DECLINED_HEADER: ["unable n1/a"],
        topology.WAITED_HEADER: 10,
    }
    assert delivery({**headers, "x-delivery-count": 3}).history == headers


# What nobody can use.


def test_what_is_refused_is_the_same_message_with_reason_and_origin_beside_it() -> None:
    confirmed: list[bool] = []
    made = delivery({"x": 1}, body=b"\xff\0", kind="Any", queue="verdicts")
    aside = made.as_dead_message("no reason " * 1_000, lambda: confirmed.append(True))
    assert (aside.exchange, aside.routing_key) == ("keepwarm.dead", "dead-messages")
    assert (aside.body, aside.kind, aside.message_id) == (b"\xff\0", "Any", "m-1")
    assert aside.headers[topology.ORIGIN_HEADER] == "verdicts"
    assert aside.headers[topology.REASON_HEADER] == "no reason " * 100
    assert not aside.transient
    assert aside.on_confirmed is not None
    aside.on_confirmed()
    assert confirmed == [True]


# Messages from before a lost connection.


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Consumer]:
    """One that was never opened, and does not mind."""
    with unopened("runs", prefetch=5) as made:
        monkeypatch.setattr(made, "raise_if_dead", lambda: None)
        yield made


def arrives(consumer: Consumer, tag: int, body: bytes = b"", **properties: Any) -> None:
    fields = {"headers": None, "message_id": None, "content_type": None, "type": None}
    consumer._on_message(
        None,  # type: ignore[arg-type]
        SimpleNamespace(consumer_tag="runs", redelivered=False, delivery_tag=tag),
        SimpleNamespace(**{**fields, **properties}),
        body,
    )


class Channel:
    def __init__(self) -> None:
        self.settled: list[tuple[str, int]] = []

    def basic_ack(self, tag: int) -> None:
        self.settled.append(("ack", tag))

    def basic_nack(self, tag: int, *, requeue: bool) -> None:
        assert requeue
        self.settled.append(("nack", tag))


def test_a_message_is_taken_with_what_its_sender_said_of_it(consumer: Consumer) -> None:
    arrives(consumer, 3, b"{}", type="RunAnnouncement", content_type="application/json")
    arrives(consumer, 4)
    first, second = consumer.take(1), consumer.take(1)
    assert first is not None and second is not None
    assert (first.queue, first.kind, first.tag) == ("runs", "RunAnnouncement", 3)
    assert (second.kind, second.content_type, second.message_id, second.headers) == ("", "", "", {})


def test_what_came_before_a_connection_was_lost_is_neither_handed_out_nor_settled(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon: list[Callable[[], None]] = []
    monkeypatch.setattr(consumer, "_call_soon", soon.append)
    arrives(consumer, 1)
    arrives(consumer, 2)
    taken = consumer.take(1)
    assert taken is not None
    consumer._on_channel_lost()
    arrives(consumer, 1)  # the broker counts from the beginning again
    consumer._channel = channel = Channel()  # type: ignore[assignment]
    later = consumer.take(1)
    assert later is not None and later.epoch != taken.epoch
    consumer.acknowledge([taken, later])
    consumer.give_back([taken])
    for callback in soon:
        callback()
    assert channel.settled == [("ack", 1)]


# How many bytes it keeps.


def test_messages_over_the_bound_of_bytes_are_returned_once_others_are_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with unopened("runs", prefetch=9, max_bytes=10) as consumer:
        monkeypatch.setattr(consumer, "raise_if_dead", lambda: None)
        monkeypatch.setattr(consumer, "_call_soon", lambda callback: callback())
        consumer._channel = channel = Channel()  # type: ignore[assignment]
        for tag, size in enumerate((20, 4, 4, 20), 1):  # the first is kept, whatever its size
            arrives(consumer, tag, b"x" * size)
        first = consumer.take(1)
        assert first is not None and consumer.take(0.001) is None
        consumer.acknowledge([first])
        assert channel.settled == [("ack", 1), ("nack", 2), ("nack", 3), ("nack", 4)]
        for tag in (5, 6, 7):
            arrives(consumer, tag, b"x" * 4)
        held = [consumer.take(1), consumer.take(1)]
        assert [each and each.tag for each in held] == [5, 6]
        assert consumer._unsettled.total() == 3
        consumer.acknowledge([each for each in held if each])
        assert channel.settled[4:] == [("ack", 5), ("ack", 6), ("nack", 7)]
        assert (consumer._unsettled.total(), consumer._unsettled_bytes.total()) == (0, 0)


# Whether it is forgotten.


def test_one_that_waits_for_long_connects_anew_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with unopened("runs") as consumer:
        asked = SimpleNamespace(queue_declare=lambda *_, **__: None)
        consumer._channel = asked  # type: ignore[assignment]
        monkeypatch.setattr(consumer, "_schedule_idle_check", lambda _: None)

        def anew(looks: int) -> list[int]:
            """At which of so many looks it connects anew."""
            found: list[int] = []
            for number in range(1, looks):

                def restart(*, routinely: bool, at: int = number) -> None:
                    assert routinely
                    found.append(at)
                    consumer._idle_checks = 0  # as a new channel does

                monkeypatch.setattr(consumer, "_restart_connection", restart)
                consumer._check_idle(consumer._epoch)
            return found

        assert anew(260) == [4, 12, 28, 60, 124, 188, 252]
        arrives(consumer, 1)
        consumer._unsettled.clear()
        assert anew(7) == [5]  # at the first look something had come


# How many consumers there are.


class ManyMessages:
    """A channel on which messages always wait. As the broker has it, a consumer that was cancelled
    is there until all that it holds is settled.
    """

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.consumer._call_soon = lambda callback: callback()  # type: ignore[method-assign]
        self.consumer._channel = self  # type: ignore[assignment]
        self.consumer._consuming = True
        self._next_prefetch = 0
        self.prefetch: dict[str, int] = {}
        self.fewer_come = False

    @property
    def held(self) -> dict[str, int]:
        return {tag: held for tag, held in self.consumer._unsettled.items() if held}

    def want(self, prefetch: int) -> None:
        self.consumer.set_prefetch(prefetch)

    def settle(self, tag: str) -> None:
        self.consumer.acknowledge([delivery(consumer=tag, epoch=self.consumer._epoch)])
        if tag in self.prefetch and not self.fewer_come:
            self.consumer._unsettled[tag] += 1
            self.consumer._adjust_prefetch()

    def basic_qos(self, *, prefetch_count: int) -> None:
        self._next_prefetch = prefetch_count

    def basic_consume(self, _: str, __: Any, consumer_tag: str, callback: Any) -> None:
        self.prefetch[consumer_tag] = self._next_prefetch
        self.consumer._unsettled[consumer_tag] = self._next_prefetch
        callback(None)

    def basic_cancel(self, tag: str, callback: Any) -> None:
        # Otherwise a message might be on its way to it.
        assert self.consumer._unsettled[tag] == self.prefetch.pop(tag)
        callback(None)

    def basic_ack(self, _: int) -> None:
        pass


@contextmanager
def many_messages() -> Iterator[ManyMessages]:
    with unopened("claims.x") as consumer:
        yield ManyMessages(consumer)


@given(st.lists(st.integers(1, 256) | st.tuples(st.integers(0), st.integers(1, 40)), max_size=40))
def test_with_no_more_than_24_consumers_as_much_is_in_hand_as_is_wanted_and_never_more(
    steps: list[int | tuple[int, int]],
) -> None:
    with many_messages() as channel:
        wanted = most = 1
        for step in steps:
            if isinstance(step, int):
                wanted = step
                most = max(most, wanted)
                channel.want(wanted)
            else:
                first, count = step
                for number in range(first, first + count):
                    if channel.held:
                        channel.settle(list(channel.held)[number % len(channel.held)])
            assert len(channel.held.keys() | channel.prefetch.keys()) <= 23
            assert 1 + sum(channel.held.values()) <= most
        for _ in range(600):  # whatever was before, it comes to what is wanted
            if channel.held:
                channel.settle(next(iter(channel.held)))
        for tag in [tag for tag in channel.held if tag not in channel.prefetch]:
            while channel.held.get(tag):
                channel.settle(tag)
        assert 1 + sum(channel.prefetch.values()) == wanted


@pytest.mark.parametrize("prefetch", [2, 16, 24])
def test_up_to_24_messages_each_has_a_consumer_of_its_own(prefetch: int) -> None:
    with many_messages() as channel:
        channel.want(prefetch)
        assert list(channel.prefetch.values()) == [1] * (prefetch - 1)


def test_a_consumer_is_not_ended_while_a_message_may_be_on_its_way_to_it() -> None:
    with many_messages() as channel:
        channel.want(4)
        channel.fewer_come = True
        for tag in list(channel.held):
            channel.settle(tag)
        channel.want(2)
        assert len(channel.prefetch) == 3
        for tag in channel.prefetch:
            channel.consumer._unsettled[tag] = 1
        channel.consumer._adjust_prefetch()
        assert len(channel.prefetch) == 1
