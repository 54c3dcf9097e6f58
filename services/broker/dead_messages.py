"""The messages in `dead-messages`: looked at, sent back to where they belong, or let go."""

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
# By its type, where a message belongs; what it says of itself is not believed. Claims go the way of
# those that workers give back: the collector has their producer's proofs checked.
_BELONGS = {
    ClaimBatch.wire_type: (topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE),
    VerdictBatch.wire_type: (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    ContextReady.wire_type: (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    RunAnnouncement.wire_type: (topology.RUNS_EXCHANGE, topology.RUNS_QUEUE),
    DeadClaim.wire_type: (topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE),
}

# https://www.rabbitmq.com/docs/dlx: why a broker takes a message off a queue by itself.
_GIVEN_UP = {
    "expired": "the broker gave it up: it waited for longer than a policy's message-ttl",
    "delivery_limit": "the broker gave it up: it was returned more often than its queue's "
    "delivery limit (docs/broker.md)",
    "maxlen": "the broker gave it up: its queue was full, by a policy's max-length",
}

MAX_SHOWN = 1_000
# Of the messages in our hands, so many that are to stay: then they go to the end of the queue.
_MOST_KEPT = MAX_SHOWN // 2

Fate = Literal["retry", "drop", "keep"]


def reason(message: Delivery) -> str:
    """Why it could not be used: as we noted it, or as the broker did."""
    noted = message.headers.get(topology.REASON_HEADER)
    match message.headers.get("x-death"):
        case [{"reason": str(why)}, *_] if not noted:
            return _GIVEN_UP.get(why, f"the broker gave it up: {why}")
    return str(noted or "the broker gave it up")


def origin(message: Delivery) -> str:
    """The queue that it was taken from: as we noted it, or as the broker did."""
    noted = message.headers.get(topology.ORIGIN_HEADER)
    match message.headers.get("x-death"):
        case [{"queue": str(queue)}, *_] if not noted:
            return queue
    return str(noted or "")


def number(message: Delivery) -> str:
    """An id that is made of the message's content."""
    content = f"{origin(message)} {message.body.hex()}"
    return content_id("msg", [content, reason(message)], hex_digits=8)


def belongs(message: Delivery) -> str | None:
    """The queue that a message of its type belongs to; None where it is none of ours."""
    found = _BELONGS.get(message.kind)
    return found and found[1]


class DeadMessages:
    """Has them in its hands while it is open; those left alone stay in the queue.

    Each method raises BrokerError when the broker cannot be used.
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
        """The first `MAX_SHOWN`, by their `number`."""
        self._consumer.open(self._timeout_seconds)
        found: dict[str, Delivery] = {}
        while len(found) < MAX_SHOWN:
            delivery = self._consumer.take(_LULL_SECONDS)
            if delivery is None:
                break
            found[number(delivery)] = delivery
        return found

    def settle(self, fate: Callable[[Delivery], Fate]) -> Counter[Fate]:
        """Send each message that is there now back, let it go for good, or leave it, as `fate`
        says; how many of each. However many there are, few are in memory. One of a type that
        belongs nowhere stays.

        What the broker does not confirm stays dead, and may come twice.
        """
        settled: Counter[Fate] = Counter()
        kept: list[Delivery] = []

        def keep(message: Delivery) -> None:
            kept.append(message)
            if len(kept) == _MOST_KEPT:  # those behind them would not come
                for one in kept:
                    publisher.publish(
                        one.set_aside(reason(one), origin(one), self._acknowledge(one))
                    )
                kept.clear()

        with Publisher(self._address, "dead-retry", window=MAX_SHOWN).open(
            self._timeout_seconds
        ) as publisher:
            # What dies again meanwhile comes behind them.
            for _ in range(self._count(publisher)):
                message = self._consumer.take(_LULL_SECONDS)
                if message is None:
                    break
                wanted = fate(message)
                if wanted == "retry" and belongs(message) is None:
                    wanted = "keep"
                settled[wanted] += 1
                match wanted:
                    case "retry":
                        publisher.publish(self._sent_back(message))
                    case "drop":
                        self._consumer.acknowledge([message])
                    case "keep":
                        keep(message)
            publisher.flush(_FLUSH_SECONDS)
        return settled

    def _count(self, link: Publisher) -> int:
        """How many there are; from then on they come."""
        answers: queue.SimpleQueue[Counts] = queue.SimpleQueue()
        link.ask_counts([topology.DEAD_MESSAGES_QUEUE], answers.put)
        try:
            counts = answers.get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise BrokerUnreachable(
                f"{self._address} did not say within {self._timeout_seconds:g} s how many dead "
                "messages there are; try again"
            ) from None
        self._consumer.open(self._timeout_seconds)
        return counts.get(topology.DEAD_MESSAGES_QUEUE, 0)

    def _sent_back(self, message: Delivery) -> Outgoing:
        exchange, queue = _BELONGS[message.kind]
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
