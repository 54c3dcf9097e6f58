"""The messages in `dead-messages`: looked at, sent back to where they came from, or let go."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from services.broker.address import BrokerAddress
from services.broker.consumer import Consumer
from services.broker.delivery import Delivery
from services.broker.publisher import Outgoing, Publisher
from services.contracts import topology
from services.contracts.values import content_id

_LULL_SECONDS = 1.0
_FLUSH_SECONDS = 30.0
_EXCHANGES = {
    topology.RETURNS_QUEUE: topology.RETURNS_EXCHANGE,
    topology.VERDICTS_QUEUE: topology.VERDICTS_EXCHANGE,
    topology.RUNS_QUEUE: topology.RUNS_EXCHANGE,
    topology.DEAD_CLAIMS_QUEUE: topology.DEAD_EXCHANGE,
}

# https://www.rabbitmq.com/docs/dlx: why a broker takes a message off a queue by itself.
_GIVEN_UP = {
    "expired": "the broker gave it up: it waited for longer than a policy's message-ttl",
    "delivery_limit": "the broker gave it up: it was returned more often than its queue's "
    "delivery limit (docs/broker.md)",
    "maxlen": "the broker gave it up: its queue was full, by a policy's max-length",
}

MAX_SHOWN = 1_000


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


class DeadMessages:
    """Holds up to `MAX_SHOWN` of them while it is open; those left alone stay in the queue."""

    def __init__(self, address: BrokerAddress, timeout_seconds: float) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._consumer = Consumer(
            address, "dead-messages", queues=[topology.DEAD_MESSAGES_QUEUE], prefetch=MAX_SHOWN
        )

    def __enter__(self) -> Self:
        """Raises BrokerError when the broker cannot be used."""
        self._consumer.open(self._timeout_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._consumer.close()

    def all(self) -> dict[str, Delivery]:
        """By an id that is made of the message's content."""
        found: dict[str, Delivery] = {}
        while len(found) < MAX_SHOWN:
            delivery = self._consumer.take(_LULL_SECONDS)
            if delivery is None:
                break
            number = f"{origin(delivery)} {delivery.body.hex()}"
            found[content_id("msg", [number, reason(delivery)], hex_digits=8)] = delivery
        return found

    def drop(self, messages: Sequence[Delivery]) -> None:
        """Let them go for good."""
        self._consumer.acknowledge(messages)

    def retry(self, messages: Sequence[Delivery]) -> int:
        """Send them back to where they came from; how many of them. Others have no such place.

        Raises BrokerUnreachable when the broker does not confirm them; they stay dead then.
        """
        back = [(each, exchange) for each in messages if (exchange := _exchange(origin(each)))]
        with Publisher(self._address, "dead-retry", window=len(back) + 1).open(
            self._timeout_seconds
        ) as publisher:
            for message, exchange in back:
                publisher.publish(
                    Outgoing(
                        exchange,
                        origin(message),
                        message.body,
                        message_id=message.message_id,
                        kind=message.kind,
                        on_confirmed=self._acknowledge(message),
                    )
                )
            publisher.flush(_FLUSH_SECONDS)
        return len(back)

    def _acknowledge(self, message: Delivery) -> Callable[[], None]:
        return lambda: self._consumer.acknowledge([message])


def _exchange(queue: str) -> str | None:
    is_claims = queue.startswith(topology.claims_queue(""))
    return topology.CLAIMS_EXCHANGE if is_claims else _EXCHANGES.get(queue)
