"""Exchanges and queues, declared idempotently by whoever comes first."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pika.channel import Channel

from services.contracts import topology as names

Step = Callable[[Channel, Callable[[Any], None]], None]


def quorum_arguments(server_version: str, *, dead_letters: bool) -> dict[str, Any]:
    """The arguments of a quorum queue on a broker of this version.

    Failures are counted by us, per claim, so the broker's delivery limit has to be out of the way:
    4.x has one of 20 unless told -1; before, there is none, and -1 would dead-letter at once.
    """
    arguments: dict[str, Any] = {"x-queue-type": "quorum"}
    if int(server_version.partition(".")[0]) >= 4:
        arguments["x-delivery-limit"] = -1
    if dead_letters:
        arguments |= {
            "x-dead-letter-exchange": names.DEAD_EXCHANGE,
            "x-dead-letter-routing-key": names.DEAD_MESSAGES_QUEUE,
            # A dead letter is confirmed by its new queue before it leaves the old one; the broker
            # wants reject-publish for that.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    return arguments


def _steps(server_version: str, context_ids: Sequence[str]) -> Iterator[Step]:
    def exchange(name: str) -> Step:
        return lambda channel, done: channel.exchange_declare(
            name, exchange_type="direct", durable=True, callback=done
        )

    def queue(name: str, exchange_name: str, *, dead_letters: bool = True) -> Iterator[Step]:
        yield lambda channel, done: channel.queue_declare(
            name,
            durable=True,
            arguments=quorum_arguments(server_version, dead_letters=dead_letters),
            callback=done,
        )
        yield lambda channel, done: channel.queue_bind(
            name, exchange_name, routing_key=name, callback=done
        )

    for name in (
        names.CLAIMS_EXCHANGE,
        names.VERDICTS_EXCHANGE,
        names.RUNS_EXCHANGE,
        names.DEAD_EXCHANGE,
    ):
        yield exchange(name)
    yield from queue(names.DEAD_MESSAGES_QUEUE, names.DEAD_EXCHANGE, dead_letters=False)
    yield from queue(names.DEAD_CLAIMS_QUEUE, names.DEAD_EXCHANGE)
    yield from queue(names.VERDICTS_QUEUE, names.VERDICTS_EXCHANGE)
    yield from queue(names.RUNS_QUEUE, names.RUNS_EXCHANGE)
    for context_id in context_ids:
        yield from queue(names.claims_queue(context_id), names.CLAIMS_EXCHANGE)


def declare(
    channel: Channel, server_version: str, context_ids: Sequence[str], done: Callable[[], None]
) -> None:
    """Declare all that Keepwarm needs, with a claims queue for each context, then call `done`.

    A queue that exists with other arguments makes the broker close the channel with 406.
    """
    steps = _steps(server_version, context_ids)

    def advance(_: Any = None) -> None:
        step = next(steps, None)
        if step is None:
            done()
        else:
            step(channel, advance)

    advance()
