"""The messages in `dead-messages`: list them, send them back to their queue, or drop them."""

import queue
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal, Self

from services.broker.address import BrokerAddress
from services.broker.consumer import Consumer
from services.broker.delivery import Delivery
from services.broker.publisher import Outgoing, Publisher
from services.broker.queue_counts import Counts
from services.contracts import (
    ClaimBatch,
    ContextReady,
    DeadClaim,
    RunAnnouncement,
    VerdictBatch,
    decode,
    topology,
)
from services.contracts.errors import BrokerUnreachable, MessageInvalid, MessageTooNew
from services.contracts.values import content_id
from services.contracts.wire import Message

_FLUSH_SECONDS = 30.0
# The exchange and queue to send a message of a kind back to; its headers are not trusted. Claims go
# to the returns queue: the collector checks their producer's proofs. Nobody can check an
# announcement, so none is sent back.
_TARGETS: dict[type[Message], tuple[str, str]] = {
    ClaimBatch: (topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE),
    VerdictBatch: (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    ContextReady: (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    DeadClaim: (topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE),
}
_KINDS = {kind.wire_type: kind for kind in _TARGETS}

# https://www.rabbitmq.com/docs/dlx: why a broker takes a message off a queue by itself.
_DEAD_LETTER_REASONS = {
    "expired": "the broker removed it: it waited longer than a policy's message-ttl",
    "delivery_limit": "the broker removed it: it was returned more often than its queue's "
    "delivery limit allows (docs/broker.md)",
    "maxlen": "the broker removed it: its queue was full, by a policy's max-length",
}

MAX_SHOWN = 1_000
# Once so many unsettled messages are to stay in the queue, they are moved to its end.
_MAX_KEPT = MAX_SHOWN // 2

Action = Literal["retry", "drop", "keep"]


def reason(message: Delivery) -> str:
    """Why it could not be used, according to our header or the broker's."""
    noted = message.headers.get(topology.REASON_HEADER)
    match message.headers.get("x-death"):
        case [{"reason": str(why)}, *_] if not noted:
            return _DEAD_LETTER_REASONS.get(why, f"the broker removed it: {why}")
    return str(noted or "the broker removed it")


def origin(message: Delivery) -> str:
    """The queue that it was taken from, according to our header or the broker's."""
    noted = message.headers.get(topology.ORIGIN_HEADER)
    match message.headers.get("x-death"):
        case [{"queue": str(queue)}, *_] if not noted:
            return queue
    return str(noted or "")


def short_id(message: Delivery) -> str:
    """An id made from the message's content, by which a person names it."""
    content = f"{origin(message)} {message.body.hex()}"
    return content_id("msg", [content, reason(message)], hex_digits=8)


def retry_error(message: Delivery) -> str | None:
    """Why it cannot be sent back, and what to do; None if it can."""
    if message.kind == RunAnnouncement.wire_type:
        return (
            "an announcement of a run makes work, and its sender cannot be verified; submit the "
            "file again"
        )
    kind = _KINDS.get(message.kind)
    if kind is None:
        return f"it has the type {message.kind!r}, which no queue of Keepwarm has"
    try:
        decode(kind, message.body)
    except MessageInvalid:
        return f"it is not a valid {message.kind}; `keepwarm dead drop` deletes it"
    except MessageTooNew:
        return f"it is a newer {message.kind}; use the `keepwarm` of its sender's version"
    return None


class DeadMessages:
    """Holds the messages unsettled while it is open; those not settled stay in the queue.

    Each method raises BrokerError if the broker cannot be used.
    """

    def __init__(self, address: BrokerAddress, timeout_seconds: float) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._consumer = Consumer(
            address, "dead-messages", queues=[topology.DEAD_MESSAGES_QUEUE], prefetch=MAX_SHOWN
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def first(self) -> dict[str, Delivery]:
        """The first `MAX_SHOWN` messages, by their `short_id`."""
        with Publisher(self._address, "dead-count", window=1).open(self._timeout_seconds) as link:
            count = min(self._count(link), MAX_SHOWN)
        self._consumer.open(self._timeout_seconds)
        return {short_id(message): message for message in self._take(count)}

    def settle(self, action_for: Callable[[Delivery], Action]) -> Counter[Action]:
        """Send back, drop or keep each message that is in the queue now, as `action_for` decides.
        Return how many of each. Memory is bounded. A message with a `retry_error` is kept.

        A message that the broker does not confirm stays in the queue, and may be sent twice.
        """
        settled: Counter[Action] = Counter()
        kept: list[Delivery] = []

        def keep(message: Delivery) -> None:
            kept.append(message)
            if len(kept) == _MAX_KEPT:  # the broker would deliver none of those behind them
                for one in kept:
                    publisher.publish(
                        one.as_dead_message(reason(one), self._acknowledge(one), origin=origin(one))
                    )
                kept.clear()

        with Publisher(self._address, "dead-retry", window=MAX_SHOWN).open(
            self._timeout_seconds
        ) as publisher:
            # Messages that are dead-lettered again meanwhile are behind these.
            count = self._count(publisher)
            self._consumer.open(self._timeout_seconds)
            for message in self._take(count):
                action = action_for(message)
                if action == "retry" and retry_error(message) is not None:
                    action = "keep"
                settled[action] += 1
                match action:
                    case "retry":
                        publisher.publish(self._sent_back(message))
                    case "drop":
                        self._consumer.acknowledge([message])
                    case "keep":
                        keep(message)
            publisher.flush(_FLUSH_SECONDS)
        return settled

    def _take(self, count: int) -> Iterator[Delivery]:
        """So many messages; fewer if another process has taken some of them meanwhile."""
        for _ in range(count):
            message = self._consumer.take(self._timeout_seconds)
            if message is None:
                return
            yield message

    def _count(self, link: Publisher) -> int:
        """How many messages there are."""
        answers: queue.SimpleQueue[Counts] = queue.SimpleQueue()
        link.request_counts([topology.DEAD_MESSAGES_QUEUE], answers.put)
        try:
            counts = answers.get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise BrokerUnreachable(
                f"{self._address} did not report the number of dead messages within "
                f"{self._timeout_seconds:g} s; try again"
            ) from None
        return counts.get(topology.DEAD_MESSAGES_QUEUE, 0)

    def _sent_back(self, message: Delivery) -> Outgoing:
        exchange, queue = _TARGETS[_KINDS[message.kind]]
        return Outgoing(
            exchange,
            queue,
            message.body,
            message_id=message.message_id,
            kind=message.kind,
            on_confirmed=self._acknowledge(message),
        )

    def _acknowledge(self, message: Delivery) -> Callable[[], None]:
        return lambda: self._consumer.acknowledge([message])
