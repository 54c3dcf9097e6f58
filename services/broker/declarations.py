"""Declares exchanges and queues, idempotently."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pika.channel import Channel

from services.contracts import topology

# RabbitMQ 4's error for a queue that an older version made, without a delivery limit.
_NO_LIMIT = re.compile(
    r"inequivalent arg 'x-delivery-limit' for queue '([^']+)' .* but current is none"
)

Step = Callable[[Channel, Callable[[Any], None]], None]


@dataclass(frozen=True, slots=True)
class Declares:
    """What a service declares on every new channel. Least privilege: a worker declares nothing.

    `core` are the exchanges and queues that do not depend on a context, `context_ids` the claims
    queues. "unbound" declares without binding: if all exist, it only compares their arguments.
    """

    core: Literal["always", "if-missing", "never", "unbound"] = "never"
    context_ids: tuple[str, ...] = ()


def quorum_arguments(
    server_version: str, *, dead_letters: bool, made_before_4: bool = False
) -> dict[str, Any]:
    """The arguments of a quorum queue on a broker of this version.

    Keepwarm counts failures itself, per claim, so the broker's delivery limit is turned off. In 4.x
    it is 20 by default, and -1 turns it off; older versions have none, and -1 would dead-letter at
    once. A queue that was made before the broker became 4.x keeps its arguments, without -1.
    """
    arguments: dict[str, Any] = {"x-queue-type": "quorum"}
    if int(server_version.partition(".")[0]) >= 4 and not made_before_4:
        arguments["x-delivery-limit"] = -1
    if dead_letters:
        arguments |= {
            "x-dead-letter-exchange": topology.DEAD_EXCHANGE,
            "x-dead-letter-routing-key": topology.DEAD_MESSAGES_QUEUE,
            # The target queue confirms a dead letter before it leaves the old queue. RabbitMQ
            # requires reject-publish for that.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    return arguments


def queue_made_before_4(refusal: str) -> str | None:
    """The queue of the error, if a declaration was refused because RabbitMQ before 4.x made the
    queue without a delivery limit; None if it was refused for another reason.
    """
    found = _NO_LIMIT.search(refusal)
    return found and found[1]


def _exchange(name: str, kind: str = "direct") -> Step:
    return lambda channel, done: channel.exchange_declare(
        name, exchange_type=kind, durable=True, callback=done
    )


def _queue(
    server_version: str,
    name: str,
    exchange_name: str,
    *,
    dead_letters: bool = True,
    made_before_4: bool = False,
    bind: bool = True,
) -> Iterator[Step]:
    arguments = quorum_arguments(
        server_version, dead_letters=dead_letters, made_before_4=made_before_4
    )
    yield lambda channel, done: channel.queue_declare(
        name,
        durable=True,
        arguments=arguments,
        callback=done,
    )
    if bind:
        yield lambda channel, done: channel.queue_bind(
            name, exchange_name, routing_key=name, callback=done
        )


def _core(version: str, made_before_4: Collection[str], *, bind: bool = True) -> Iterator[Step]:
    for name in topology.DIRECT_EXCHANGES:
        yield _exchange(name)
    for queue, exchange in (
        (topology.DEAD_MESSAGES_QUEUE, topology.DEAD_EXCHANGE),
        (topology.DEAD_CLAIMS_QUEUE, topology.DEAD_EXCHANGE),
        (topology.RETURNS_QUEUE, topology.RETURNS_EXCHANGE),
        (topology.VERDICTS_QUEUE, topology.VERDICTS_EXCHANGE),
        (topology.RUNS_QUEUE, topology.RUNS_EXCHANGE),
    ):
        yield from _queue(
            *(version, queue, exchange),
            dead_letters=queue != topology.DEAD_MESSAGES_QUEUE,
            made_before_4=queue in made_before_4,
            bind=bind,
        )
    yield _exchange(topology.HEARTBEATS_EXCHANGE, "fanout")
    # Declared last: if it exists, all the others do.
    yield _exchange(topology.CONTROL_EXCHANGE, "fanout")


def _steps(
    server_version: str,
    declares: Declares,
    core_is_missing: bool,
    made_before_4: Collection[str],
) -> Iterator[Step]:
    if declares.core == "always" or (declares.core == "if-missing" and core_is_missing):
        yield from _core(server_version, made_before_4)
    elif declares.core == "unbound":
        yield from _core(server_version, made_before_4, bind=False)
    elif declares.core == "if-missing":
        # If it is missing, the broker closes the channel with 404.
        yield lambda channel, done: channel.exchange_declare(
            topology.CONTROL_EXCHANGE, passive=True, callback=done
        )
    for context_id in declares.context_ids:
        queue = topology.claims_queue(context_id)
        yield from _queue(
            *(server_version, queue, topology.CLAIMS_EXCHANGE), made_before_4=queue in made_before_4
        )


def declare(
    channel: Channel,
    server_version: str,
    declares: Declares,
    done: Callable[[], None],
    *,
    core_is_missing: bool,
    made_before_4: Collection[str] = (),
) -> None:
    """Declare everything in order, then call `done`.

    If a queue exists with other arguments, the broker closes the channel with 406.
    `made_before_4` are queues known to have no argument for the delivery limit.
    """
    steps = _steps(server_version, declares, core_is_missing, made_before_4)
    run_in_order(channel, steps, done)


def run_in_order(channel: Channel, steps: Iterator[Step], done: Callable[[], None]) -> None:
    """Run each step once the broker has answered the previous one, then call `done`."""

    def advance(_: Any = None) -> None:
        step = next(steps, None)
        if step is None:
            done()
        else:
            step(channel, advance)

    advance()


def listener_steps(queue: str, exchange: str) -> Sequence[Step]:
    """Steps that declare an exclusive queue and bind it to a fanout exchange."""
    return (
        lambda channel, done: channel.queue_declare(queue, exclusive=True, callback=done),
        lambda channel, done: channel.queue_bind(queue, exchange, callback=done),
    )
