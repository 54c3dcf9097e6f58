"""Taking messages: a small prefetch, heartbeats while the work lasts, and a drain."""

import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from pika.channel import Channel

from services.broker.address import BrokerAddress
from services.broker.link import Link

_DELIVERY_COUNT = "x-delivery-count"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message in our hands. Until it is settled it is the broker's, and comes again if we die."""

    queue: str
    body: bytes
    headers: Mapping[str, Any]
    message_id: str
    redelivered: bool
    tag: int
    epoch: int

    @property
    def attempt(self) -> int:
        """1 for the first delivery; quorum queues count the earlier ones."""
        return int(self.headers.get(_DELIVERY_COUNT, 0)) + 1


class Consumer(Link):
    """Takes messages from `queues`, at most `prefetch` unsettled ones from each.

    Deliveries wait in memory until `take`; whoever took one settles it from any thread with
    `acknowledge`, `give_back` or `refuse`, minutes later if need be: the link's own thread keeps
    the heartbeats going. A delivery from before a lost connection is settled in vain, on purpose:
    the broker has already given it to someone.
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        *,
        queues: Sequence[str],
        prefetch: int,
        context_ids: Sequence[str] = (),
    ) -> None:
        super().__init__(address, name, context_ids)
        self._queues = tuple(queues)
        self._prefetch = prefetch
        self._inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._taking = True
        self._stopped_taking = threading.Event()
        self._epoch = 0

    def take(self, timeout_seconds: float) -> Delivery | None:
        """The next message, or None when none came in time. Raises BrokerError on a dead link."""
        self._raise_if_dead()
        try:
            while True:
                delivery = self._inbox.get(timeout=timeout_seconds)
                if delivery.epoch == self._epoch:
                    return delivery
        except queue.Empty:
            return None

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """They are done: the broker may forget them."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_ack(tag))

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Return them unharmed, for someone else: `basic.nack`, which never counts as a failure."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_nack(tag, requeue=True))

    def refuse(self, deliveries: Iterable[Delivery]) -> None:
        """They are not messages that anyone can use: to the dead-letter queue."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_nack(tag, requeue=False))

    def stop_taking(self, timeout_seconds: float) -> None:
        """Take no more, and give back what nobody took. What was taken can still be settled."""
        self._call_soon(self._cancel)
        self._stopped_taking.wait(timeout_seconds)
        untaken: list[Delivery] = []
        while not self._inbox.empty():
            untaken.append(self._inbox.get())
        self.give_back(untaken)

    # The owning thread.

    def _settle(self, deliveries: list[Delivery], settle: Any) -> None:
        def now() -> None:
            for delivery in deliveries:
                if self._channel is not None and delivery.epoch == self._epoch:
                    settle(self._channel, delivery.tag)

        if deliveries:
            self._call_soon(now)

    def _on_channel_ready(self, channel: Channel) -> None:
        self._epoch += 1
        if not self._taking:
            return
        channel.add_on_cancel_callback(self._on_cancelled_by_broker)
        channel.basic_qos(prefetch_count=self._prefetch)
        for name in self._queues:
            # The consumer's tag is the queue's name, so that a delivery tells where it is from.
            channel.basic_consume(name, self._on_message, consumer_tag=name)

    def _on_channel_lost(self) -> None:
        # An epoch without a channel: whatever is in hand is the broker's again.
        self._epoch += 1

    def _on_message(self, _: Channel, method: Any, properties: Any, body: bytes) -> None:
        self._inbox.put(
            Delivery(
                queue=method.consumer_tag,
                body=body,
                headers=properties.headers or {},
                message_id=properties.message_id or "",
                redelivered=method.redelivered,
                tag=method.delivery_tag,
                epoch=self._epoch,
            )
        )

    def _on_cancelled_by_broker(self, frame: Any) -> None:
        # A deleted queue leaves a connection that is open and silent.
        log.warning("broker.cancelled", link=self._name, queue=frame.method.consumer_tag)
        self._restart_connection()

    def _cancel(self) -> None:
        self._taking = False
        if self._channel is None:
            self._stopped_taking.set()
            return
        waiting = set(self._queues)

        def cancelled(name: str) -> None:
            waiting.discard(name)
            if not waiting:
                self._stopped_taking.set()

        for name in self._queues:
            self._channel.basic_cancel(name, callback=lambda _, name=name: cancelled(name))
