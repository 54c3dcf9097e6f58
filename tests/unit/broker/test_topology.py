from collections.abc import Callable
from typing import Any

import pytest

from services.broker.topology import declare, quorum_arguments
from services.contracts import topology as names

DEAD_LETTERS = {
    "x-dead-letter-exchange": names.DEAD_EXCHANGE,
    "x-dead-letter-routing-key": names.DEAD_MESSAGES_QUEUE,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@pytest.mark.parametrize("version", ["3.10.8", "3.12.0-rc.1", "3.13.7"])
def test_before_4_no_delivery_limit_is_set_for_minus_one_would_dead_letter_at_once(
    version: str,
) -> None:
    assert quorum_arguments(version, dead_letters=False) == {"x-queue-type": "quorum"}


@pytest.mark.parametrize("version", ["4.0.5", "4.1.0", "4.3.0", "4.3.0+17.g1234", "5.0.0", "4"])
def test_from_4_on_the_delivery_limit_is_out_of_the_way(version: str) -> None:
    assert quorum_arguments(version, dead_letters=False) == {
        "x-queue-type": "quorum",
        "x-delivery-limit": -1,
    }


@pytest.mark.parametrize("version", ["3.10.8", "3.13.7", "4.0.5", "4.3.0"])
def test_dead_letters_reach_their_queue_at_least_once_whatever_the_version(version: str) -> None:
    plain = quorum_arguments(version, dead_letters=False)
    assert quorum_arguments(version, dead_letters=True) == plain | DEAD_LETTERS


class RecordingChannel:
    """Answers every declaration at once, as a broker would one by one."""

    def __init__(self) -> None:
        self.exchanges: list[str] = []
        self.queues: dict[str, dict[str, Any]] = {}
        self.bindings: list[tuple[str, str, str]] = []

    def exchange_declare(
        self, name: str, *, exchange_type: str, durable: bool, callback: Callable[[Any], None]
    ) -> None:
        assert exchange_type == "direct"
        assert durable
        self.exchanges.append(name)
        callback(None)

    def queue_declare(
        self,
        name: str,
        *,
        durable: bool,
        arguments: dict[str, Any],
        callback: Callable[[Any], None],
    ) -> None:
        assert durable
        self.queues[name] = arguments
        callback(None)

    def queue_bind(
        self, name: str, exchange: str, *, routing_key: str, callback: Callable[[Any], None]
    ) -> None:
        assert name in self.queues
        assert exchange in self.exchanges
        self.bindings.append((name, exchange, routing_key))
        callback(None)


def test_all_that_keepwarm_needs_is_declared_then_done_is_called_once() -> None:
    channel, done = RecordingChannel(), []
    declare(channel, "3.10.8", ["ctx-1", "ctx-2"], lambda: done.append(True))
    assert done == [True]
    assert set(channel.bindings) == {
        ("dead-messages", "keepwarm.dead", "dead-messages"),
        ("dead-claims", "keepwarm.dead", "dead-claims"),
        ("verdicts", "keepwarm.verdicts", "verdicts"),
        ("runs", "keepwarm.runs", "runs"),
        ("claims.ctx-1", "keepwarm.claims", "claims.ctx-1"),
        ("claims.ctx-2", "keepwarm.claims", "claims.ctx-2"),
    }


def test_every_queue_but_that_of_dead_messages_sends_its_dead_letters_there() -> None:
    channel = RecordingChannel()
    declare(channel, "4.1.0", ["ctx-1"], lambda: None)
    for name, arguments in channel.queues.items():
        assert ("x-dead-letter-exchange" in arguments) is (name != "dead-messages")
