"""What the publisher makes of the broker's confirms; that they come is shown on a real broker."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pika.spec import Basic

from services.broker import BrokerAddress, Outgoing, Publisher
from services.contracts import load_settings


class Channel:
    """Remembers what was published."""

    def __init__(self) -> None:
        self.published: list[tuple[str, Any]] = []

    def basic_publish(
        self, exchange: str, key: str, body: bytes, how: Any, mandatory: bool
    ) -> None:
        self.published.append((key, how))


@pytest.fixture
def confirmed() -> list[str]:
    return []


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """A publisher with a channel, whose thread is the test's; it declares nothing."""
    address = BrokerAddress.from_settings(load_settings(broker_url="amqp://127.0.0.1:1/v"))
    publisher = Publisher(address, "test", window=10)
    publisher._channel = Channel()  # type: ignore[assignment]
    monkeypatch.setattr(publisher, "_call_soon", lambda callback: callback())
    monkeypatch.setattr(publisher, "raise_if_dead", lambda: None)
    later: list[Any] = []
    monkeypatch.setattr(publisher._loop, "call_later", lambda _, again: later.append(again))
    publisher.later = later  # type: ignore[attr-defined]
    yield publisher
    publisher._loop.close()


def publish(publisher: Publisher, confirmed: list[str], *ids: str) -> None:
    for number, message_id in enumerate(ids):
        key = f"key-{number}"
        publisher.publish(
            Outgoing("x", key, b"", message_id, on_confirmed=lambda key=key: confirmed.append(key))
        )


def give_back(publisher: Publisher, number: int) -> None:
    _, how = publisher._channel.published[number]  # type: ignore[union-attr]
    publisher._on_returned(None, None, how, b"")  # type: ignore[arg-type]


def confirm(publisher: Publisher, tag: int, *, multiple: bool = False) -> None:
    publisher._on_confirm(SimpleNamespace(method=Basic.Ack(tag, multiple)))


@pytest.mark.parametrize("ids", [("a", "b"), ("same", "same"), ("", "")], ids=str)
def test_two_that_came_back_are_both_sent_again_however_they_are_confirmed(
    ids: tuple[str, str], publisher: Publisher, confirmed: list[str]
) -> None:
    publish(publisher, confirmed, *ids)
    give_back(publisher, 0)
    give_back(publisher, 1)
    confirm(publisher, 1)
    confirm(publisher, 2)
    assert confirmed == [] and publisher.pending == 2
    for again in publisher.later:  # type: ignore[attr-defined]
        again()
    assert [key for key, _ in publisher._channel.published[2:]] == ["key-0", "key-1"]  # type: ignore[union-attr]
    confirm(publisher, 4, multiple=True)
    assert confirmed == ["key-0", "key-1"] and publisher.pending == 0


def test_of_two_with_one_message_id_only_the_one_that_came_back_is_sent_again(
    publisher: Publisher, confirmed: list[str]
) -> None:
    publish(publisher, confirmed, "same", "same")
    give_back(publisher, 1)
    confirm(publisher, 1)
    assert confirmed == ["key-0"]
    confirm(publisher, 2)
    assert confirmed == ["key-0"] and publisher.pending == 1


def test_what_came_back_within_several_that_are_confirmed_at_once_is_sent_again(
    publisher: Publisher, confirmed: list[str]
) -> None:
    publish(publisher, confirmed, "a", "b", "c")
    give_back(publisher, 1)
    confirm(publisher, 3, multiple=True)
    assert confirmed == ["key-0", "key-2"] and publisher.pending == 1
