from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pika.exceptions import ChannelClosedByBroker, ChannelClosedByClient, ConnectionClosed

from services.broker import Counts
from services.broker.queue_counts import count_queues


class OneChannel:
    """A channel of `RecordingConnection`; a question for a queue that is missing closes it."""

    def __init__(self, connection: "RecordingConnection") -> None:
        self._connection = connection
        self._on_close: Callable[[Any, BaseException], None] | None = None
        self.is_open = True

    def add_on_close_callback(self, callback: Callable[[Any, BaseException], None]) -> None:
        self._on_close = callback

    def queue_declare(self, name: str, *, passive: bool, callback: Callable[[Any], None]) -> None:
        assert passive, "asking must not make a queue"
        assert self.is_open
        self._connection.asked.append(name)
        if name == self._connection.lost_at:
            self._end(ConnectionClosed(320, "broker shut down"))
        elif name in self._connection.queues:
            messages = self._connection.queues[name]
            method = SimpleNamespace(message_count=messages)
            self.is_open = name != self._connection.closing_at
            self._connection.is_open = self.is_open
            callback(SimpleNamespace(method=method))
        else:
            self._end(ChannelClosedByBroker(404, f"no queue '{name}'"))

    def close(self) -> None:
        self._end(ChannelClosedByClient(0, ""))

    def _end(self, reason: BaseException) -> None:
        assert self.is_open
        self.is_open = False
        self._connection.open_channels -= 1
        assert self._on_close is not None
        self._on_close(self, reason)


class RecordingConnection:
    def __init__(self, lost_at: str = "", closing_at: str = "", **queues: int) -> None:
        self.queues = queues
        self.lost_at, self.closing_at = lost_at, closing_at
        self.is_open = True
        self.asked: list[str] = []
        self.open_channels = 0

    def channel(self, *, on_open_callback: Callable[[Any], None]) -> None:
        assert self.is_open
        self.open_channels += 1
        on_open_callback(OneChannel(self))


def received(connection: RecordingConnection, *queues: str) -> list[Counts]:
    answers: list[Counts] = []
    count_queues(connection, queues, answers.append)
    return answers


def test_each_queue_is_counted_once() -> None:
    connection = RecordingConnection(a=5, b=0)
    assert received(connection, "a", "b") == [{"a": 5, "b": 0}]
    assert (connection.asked, connection.open_channels) == (["a", "b"], 0)


@pytest.mark.parametrize("queues", [("x", "a", "b"), ("a", "x", "b"), ("a", "b", "x")])
def test_a_queue_that_is_missing_is_left_out_and_hides_no_other(queues: tuple[str, ...]) -> None:
    connection = RecordingConnection(a=5, b=0)
    assert received(connection, *queues) == [{"a": 5, "b": 0}]
    assert (connection.asked, connection.open_channels) == (list(queues), 0)


def test_to_ask_for_nothing_is_answered_too() -> None:
    assert received(RecordingConnection()) == [{}]


def test_a_lost_connection_gives_no_answer_and_asks_no_further() -> None:
    connection = RecordingConnection(lost_at="a", a=5, b=0)
    assert received(connection, "a", "b") == []
    assert connection.asked == ["a"]


def test_nothing_more_is_asked_on_a_connection_that_is_being_closed() -> None:
    connection = RecordingConnection(closing_at="a", a=5, b=0)
    assert received(connection, "a", "b") == []
    assert received(connection, "b") == []
    assert connection.asked == ["a"]
