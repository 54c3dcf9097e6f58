from collections.abc import Callable
from typing import Any

import pytest

from services.broker import Declares
from services.broker.declarations import (
    declare,
    listener_steps,
    queue_made_before_4,
    quorum_arguments,
    run_in_order,
)
from services.contracts import topology

DEAD_LETTERS = {
    "x-dead-letter-exchange": topology.DEAD_EXCHANGE,
    "x-dead-letter-routing-key": topology.DEAD_MESSAGES_QUEUE,
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


def test_a_queue_that_was_made_before_4_keeps_its_arguments() -> None:
    plain = quorum_arguments("4.0.5", dead_letters=False, made_before_4=True)
    assert plain == {"x-queue-type": "quorum"}


@pytest.mark.parametrize(
    ("refusal", "queue"),
    [
        # As RabbitMQ 4.0.5 says it.
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'claims.a' in "
            "vhost '/': received the value '-1' of type 'signedint' but current is none",
            "claims.a",
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'claims.b' in "
            "vhost '/': received '-1' but current is '50'",
            None,
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-overflow' for queue 'claims.a' in vhost "
            "'/': received the value 'reject-publish' of type 'longstr' but current is none",
            None,
        ),
    ],
)
def test_a_queue_from_before_4_is_distinguished_from_one_of_another_kind(
    refusal: str, queue: str | None
) -> None:
    assert queue_made_before_4(refusal) == queue


@pytest.mark.parametrize("version", ["3.10.8", "3.13.7", "4.0.5", "4.3.0"])
def test_dead_letters_reach_their_queue_at_least_once_whatever_the_version(version: str) -> None:
    plain = quorum_arguments(version, dead_letters=False)
    assert quorum_arguments(version, dead_letters=True) == plain | DEAD_LETTERS


class RecordingChannel:
    """Answers every declaration at once, as a broker would one by one."""

    def __init__(self) -> None:
        self.exchanges: dict[str, str] = {}
        self.looked_for: list[str] = []
        self.queues: dict[str, dict[str, Any]] = {}
        self.exclusive: list[str] = []
        self.bindings: list[tuple[str, str, str]] = []
        self.order: list[str] = []

    def exchange_declare(
        self,
        name: str,
        *,
        exchange_type: str = "direct",
        durable: bool = False,
        passive: bool = False,
        callback: Callable[[Any], None],
    ) -> None:
        if passive:
            self.looked_for.append(name)
        else:
            assert durable
            self.exchanges[name] = exchange_type
        self.order.append(name)
        callback(None)

    def queue_declare(
        self,
        name: str,
        *,
        durable: bool = False,
        exclusive: bool = False,
        arguments: dict[str, Any] | None = None,
        callback: Callable[[Any], None],
    ) -> None:
        assert durable is not exclusive
        if exclusive:
            self.exclusive.append(name)
        self.queues[name] = arguments or {}
        self.order.append(name)
        callback(None)

    def queue_bind(
        self,
        name: str,
        exchange: str,
        *,
        routing_key: str = "",
        callback: Callable[[Any], None],
    ) -> None:
        assert name in self.queues
        self.bindings.append((name, exchange, routing_key))
        callback(None)


def declared(declares: Declares, version: str = "4.1.0", *, missing: bool) -> RecordingChannel:
    channel, done = RecordingChannel(), []
    declare(channel, version, declares, lambda: done.append(True), core_is_missing=missing)  # type: ignore[arg-type]
    assert done == [True]
    return channel


CORE = {
    ("dead-messages", "keepwarm.dead", "dead-messages"),
    ("dead-claims", "keepwarm.dead", "dead-claims"),
    ("returns", "keepwarm.returns", "returns"),
    ("verdicts", "keepwarm.verdicts", "verdicts"),
    ("runs", "keepwarm.runs", "runs"),
}
CLAIMS = {
    ("claims.ctx-1", "keepwarm.claims", "claims.ctx-1"),
    ("claims.ctx-2", "keepwarm.claims", "claims.ctx-2"),
}


@pytest.mark.parametrize("missing", [True, False])
def test_who_always_declares_makes_the_whole_house_and_its_claims_queues(missing: bool) -> None:
    channel = declared(Declares("always", ("ctx-1", "ctx-2")), missing=missing)
    assert set(channel.bindings) == CORE | CLAIMS
    assert {exchange for _, exchange, _ in channel.bindings} <= channel.exchanges.keys()
    assert channel.exchanges["keepwarm.notices"] == "fanout"
    assert channel.exchanges["keepwarm.presence"] == "fanout"
    others = channel.exchanges.keys() - {"keepwarm.notices", "keepwarm.presence"}
    assert {channel.exchanges[name] for name in others} == {"direct"}
    every = {value for name, value in vars(topology).items() if name.endswith("_EXCHANGE")}
    assert channel.exchanges.keys() == every


def test_who_declares_what_is_missing_looks_first_and_makes_only_its_claims_queues() -> None:
    channel = declared(Declares("if-missing", ("ctx-1", "ctx-2")), missing=False)
    assert channel.looked_for == ["keepwarm.notices"]
    assert channel.exchanges == {}
    assert set(channel.bindings) == CLAIMS


def test_who_found_the_house_missing_makes_it() -> None:
    channel = declared(Declares("if-missing", ("ctx-1", "ctx-2")), missing=True)
    assert set(channel.bindings) == CORE | CLAIMS
    assert channel.looked_for == []


@pytest.mark.parametrize("missing", [True, False])
def test_a_worker_declares_nothing_at_all(missing: bool) -> None:
    assert declared(Declares(), missing=missing).order == []


def test_the_exchange_that_others_check_for_is_declared_last() -> None:
    assert declared(Declares("always"), missing=True).order[-1] == topology.CONTROL_EXCHANGE


def test_every_queue_but_that_of_dead_messages_sends_its_dead_letters_there() -> None:
    channel = declared(Declares("always", ("ctx-1",)), missing=True)
    for name, arguments in channel.queues.items():
        assert arguments["x-queue-type"] == "quorum"
        assert ("x-dead-letter-exchange" in arguments) is (name != "dead-messages")


def test_a_listener_has_a_queue_of_its_own_for_notices_that_goes_when_it_goes() -> None:
    channel, done = RecordingChannel(), []
    run_in_order(
        channel,  # type: ignore[arg-type]
        iter(listener_steps("notices.node-1.1", "keepwarm.notices")),
        lambda: done.append(True),
    )
    assert done == [True]
    assert channel.exclusive == ["notices.node-1.1"]
    assert channel.bindings == [("notices.node-1.1", "keepwarm.notices", "")]


def test_steps_are_taken_one_at_a_time_each_after_the_brokers_answer() -> None:
    answers: list[Callable[[Any], None]] = []
    taken: list[int] = []
    done: list[bool] = []

    def step(number: int) -> Any:
        def take(_: Any, answered: Callable[[Any], None]) -> None:
            taken.append(number)
            answers.append(answered)

        return take

    run_in_order(None, iter([step(1), step(2)]), lambda: done.append(True))  # type: ignore[arg-type]
    assert (taken, done) == ([1], [])
    answers.pop()(None)
    assert (taken, done) == ([1, 2], [])
    answers.pop()(None)
    assert done == [True]
