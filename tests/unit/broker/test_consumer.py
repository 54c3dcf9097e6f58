"""A delivery, and a consumer that no broker is needed for; the rest is shown on a real one."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.broker import BrokerAddress, Consumer, Delivery
from services.contracts import Notice, encode, load_settings, topology
from services.contracts.errors import MessageInvalid


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
    [({}, 1), ({"x-delivery-count": 0}, 1), ({"x-delivery-count": 3}, 4), ({"other": 9}, 1)],
)
def test_the_attempt_is_one_more_than_the_earlier_deliveries(
    headers: dict[str, object], attempt: int
) -> None:
    assert delivery(headers).attempt == attempt


# What it holds.


def test_a_delivery_of_the_right_type_is_the_message_that_it_holds() -> None:
    notice = Notice(cancelled=("sub-1",))
    assert delivery(body=encode(notice), kind="Notice").message(Notice) == notice


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
    fields = {"kind": "Notice", "body": encode(Notice()), **changes}
    with pytest.raises(MessageInvalid, match=why):
        delivery(**fields).message(Notice)


@pytest.mark.parametrize(("headers", "failures"), [({}, 0), ({topology.FAILURES_HEADER: 3}, 3)])
def test_a_delivery_tells_the_failures_that_its_claims_were_part_of(
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


# What nobody can use.


def test_what_is_refused_is_the_same_message_with_reason_and_origin_beside_it() -> None:
    confirmed: list[bool] = []
    made = delivery({"x": 1}, body=b"\xff\0", kind="Any", queue="verdicts")
    aside = made.refused("no reason " * 1_000, lambda: confirmed.append(True))
    assert (aside.exchange, aside.routing_key) == ("keepwarm.dead", "dead-messages")
    assert (aside.body, aside.kind, aside.message_id) == (b"\xff\0", "Any", "m-1")
    assert aside.headers[topology.ORIGIN_HEADER] == "verdicts"
    assert aside.headers[topology.REASON_HEADER] == "no reason " * 100
    assert not aside.notice
    assert aside.on_confirmed is not None
    aside.on_confirmed()
    assert confirmed == [True]


# Messages from before a lost connection.


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Consumer]:
    """One that was never opened, and does not mind."""
    address = BrokerAddress.from_settings(load_settings(broker_url="amqp://h"))
    made = Consumer(address, "test", queues=["runs"], prefetch=5)
    monkeypatch.setattr(made, "_raise_if_dead", lambda: None)
    yield made
    made._loop.close()


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


# How many consumers there are.


class ManyConsumers:
    """A channel on which every consumer is served at once, and always full."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._prefetch = 0
        self.prefetch: dict[str, int] = {}

    def basic_qos(self, *, prefetch_count: int) -> None:
        self._prefetch = prefetch_count

    def basic_consume(self, _: str, __: Any, consumer_tag: str, callback: Any) -> None:
        self.prefetch[consumer_tag] = self._prefetch
        self._consumer._unsettled[consumer_tag] = self._prefetch
        callback(None)

    def basic_cancel(self, tag: str, callback: Any) -> None:
        assert self._consumer._unsettled[tag] == self.prefetch.pop(tag)
        callback(None)


@given(st.lists(st.integers(1, 256), max_size=8))
def test_what_may_be_in_hand_follows_what_is_wanted_with_no_more_than_32_consumers(
    wanted: list[int],
) -> None:
    consumer = Consumer(
        BrokerAddress.from_settings(load_settings(broker_url="amqp://h")),
        "test",
        queues=["claims.x"],
        prefetch=1,
    )
    consumer._channel = channel = ManyConsumers(consumer)  # type: ignore[assignment]
    consumer._consuming = True
    for prefetch in wanted:
        consumer._wanted_prefetch = prefetch
        consumer._fit_prefetch()
        held = list(channel.prefetch.values())
        assert 1 + sum(held) == prefetch
        assert len(held) <= 31
        if prefetch <= 32 and wanted == [prefetch]:
            assert set(held) <= {1}
    consumer._loop.close()


def test_a_consumer_is_not_ended_while_a_message_may_be_on_its_way_to_it() -> None:
    consumer = Consumer(
        BrokerAddress.from_settings(load_settings(broker_url="amqp://h")),
        "test",
        queues=["claims.x"],
        prefetch=1,
    )
    consumer._channel = channel = ManyConsumers(consumer)  # type: ignore[assignment]
    consumer._consuming = True
    consumer._wanted_prefetch = 4
    consumer._fit_prefetch()
    consumer._unsettled.clear()
    consumer._wanted_prefetch = 2
    consumer._fit_prefetch()
    assert len(channel.prefetch) == 3
    for tag in channel.prefetch:
        consumer._unsettled[tag] = 1
    consumer._fit_prefetch()
    assert len(channel.prefetch) == 1
    consumer._loop.close()
