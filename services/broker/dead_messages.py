"""The messages in `dead-messages`: list them, send them back to their queue, or drop them."""

import queue
from collections import Counter
from collections.abc import Callable
from types import TracebackType
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
    topology,
)
from services.contracts.errors import BrokerUnreachable
from services.contracts.values import content_id

_LULL_SECONDS = 1.0
_FLUSH_SECONDS = 30.0
# By type, the exchange and queue to send a message back to; its headers are not trusted. Claims go
# to the returns queue: the collector checks their producer's proofs.
_TARGETS = {
    ClaimBatch.wire_type: (topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE),
    VerdictBatch.wire_type: (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    ContextReady.wire_type: (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    RunAnnouncement.wire_type: (topology.RUNS_EXCHANGE, topology.RUNS_QUEUE),
    DeadClaim.wire_type: (topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE),
}

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


def number(message: Delivery) -> str:
    """An id made from the message's content, by which a person names it."""
    content = f"{origin(message)} {message.body.hex()}"
    return content_id("msg", [content, reason(message)], hex_digits=8)


def target_queue(message: Delivery) -> str | None:
    """The queue for messages of its type; None if Keepwarm does not know the type."""
    target = _TARGETS.get(message.kind)
    return target and target[1]


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._consumer.close()

    def all(self) -> dict[str, Delivery]:
        """The first `MAX_SHOWN` messages, by their `number`."""
        self._consumer.open(self._timeout_seconds)
        found: dict[str, Delivery] = {}
        while len(found) < MAX_SHOWN:
            delivery = self._consumer.take(_LULL_SECONDS)
            if delivery is None:
                break
            found[number(delivery)] = delivery
        return found

    def settle(self, action_for: Callable[[Delivery], Action]) -> Counter[Action]:
        """Send back, drop or keep each message that is in the queue now, as `action_for` decides.
        Return how many of each. Memory is bounded. A message of an unknown type is kept.

        A message that the broker does not confirm stays in the queue, and may be sent twice.
        """
        settled: Counter[Action] = Counter()
        kept: list[Delivery] = []

        def keep(message: Delivery) -> None:
            kept.append(message)
            if len(kept) == _MAX_KEPT:  # the broker would deliver none of those behind them
                for one in kept:
                    publisher.publish(
                        one.dead_lettered(reason(one), origin(one), self._acknowledge(one))
                    )
                kept.clear()

        with Publisher(self._address, "dead-retry", window=MAX_SHOWN).open(
            self._timeout_seconds
        ) as publisher:
            # Messages that are dead-lettered again meanwhile are behind these.
            for _ in range(self._count(publisher)):
                message = self._consumer.take(_LULL_SECONDS)
                if message is None:
                    break
                action = action_for(message)
                if action == "retry" and target_queue(message) is None:
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

    def _count(self, link: Publisher) -> int:
        """How many messages there are. Starts their delivery."""
        answers: queue.SimpleQueue[Counts] = queue.SimpleQueue()
        link.request_counts([topology.DEAD_MESSAGES_QUEUE], answers.put)
        try:
            counts = answers.get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise BrokerUnreachable(
                f"{self._address} did not report the number of dead messages within "
                f"{self._timeout_seconds:g} s; try again"
            ) from None
        self._consumer.open(self._timeout_seconds)
        return counts.get(topology.DEAD_MESSAGES_QUEUE, 0)

    def _sent_back(self, message: Delivery) -> Outgoing:
        exchange, queue = _TARGETS[message.kind]
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
