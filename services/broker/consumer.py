"""Consuming messages: bounded prefetch, settlement from any thread, and a drain."""

import math
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any

import structlog
from pika.channel import Channel

from services.broker.address import BrokerAddress
from services.broker.declarations import Declares, listener_steps, run_in_order
from services.broker.delivery import Delivery
from services.broker.link import Link
from services.broker.metrics import REDELIVERED
from services.contracts import topology

_IDLE_CHECK_SECONDS = 15.0
# After this many checks without a message it reconnects; the number doubles each time.
_FIRST_IDLE_CHECKS, _MAX_IDLE_CHECKS = 4, 64
_TAG_SEPARATOR = "#"
# Per queue and channel. When a channel is lost, RabbitMQ requeues its messages consumer by
# consumer. With more than 32 consumers, the order may differ when it replays its log after a crash,
# and then it loses messages that were not settled (docs/decisions/0026). The limit is lower because
# the broker may be a few settlements behind us and still count consumers that we have cancelled.
_MAX_CONSUMERS = 24

log = structlog.get_logger(__name__)


class Consumer(Link):
    """Consumes `queues` with at most `prefetch` unsettled messages of each (`prefetch_of` overrides
    it for a queue), or more after `set_prefetch`.

    AMQP limits messages, not bytes. So `max_bytes` limits the unsettled bytes of a queue: the body
    of a message beyond it is discarded, and the message is returned to the broker once half of the
    limit is free. At least one message of each queue is kept, whatever its size.

    Deliveries wait in memory until `take`. They can be settled from any thread with `acknowledge`
    or `give_back`, also minutes later: the link's own thread keeps the connection alive. Settling a
    delivery from a lost connection does nothing: the broker has already requeued it.
    `on_fanout_message` is called on the link's thread with each message of `fanout_exchange`, by
    default the one for control updates.
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        *,
        queues: Sequence[str],
        prefetch: int,
        prefetch_of: Mapping[str, int] = MappingProxyType({}),
        max_bytes: int | None = None,
        declares: Declares = Declares(),  # noqa: B008  (frozen)
        on_fanout_message: Callable[[bytes], None] | None = None,
        listener: str = "",
        fanout_exchange: str = topology.CONTROL_EXCHANGE,
    ) -> None:
        super().__init__(address, name, declares)
        self._queues = tuple(queues)
        self._prefetch = self._target_prefetch = prefetch
        self._prefetch_of = prefetch_of
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._on_fanout_message = on_fanout_message
        self._listener = listener
        self._fanout_exchange = fanout_exchange
        self._redelivered_metric = REDELIVERED.labels(name)
        # Not SimpleQueue: before Python 3.13 its `get` never returns if a signal handler runs past
        # the time-out, so the service would not end.
        self._inbox: queue.Queue[Delivery] = queue.Queue()
        self._taking = True
        self._stopped_taking = threading.Event()
        self._epoch = 0
        self._received_since_check = False
        self._idle_checks = 0
        self._allowed_idle_checks = _FIRST_IDLE_CHECKS
        # By consumer tag.
        self._unsettled: Counter[str] = Counter()
        # By queue: the unsettled bytes, and the messages to return once there is room.
        self._unsettled_bytes: Counter[str] = Counter()
        self._over_byte_limit: defaultdict[str, list[Delivery]] = defaultdict(list)
        # By queue: the prefetch of each consumer beside the first, by its tag.
        self._extra: dict[str, dict[str, int]] = {name: {} for name in queues}
        self._numbers = count(1)
        self._consuming = self._changing = False

    def take(self, timeout_seconds: float) -> Delivery | None:
        """The next message; None after the time-out. Raises BrokerError once the link has ended."""
        self.raise_if_dead()
        try:
            while True:
                delivery = self._inbox.get(timeout=timeout_seconds)
                if delivery.epoch == self._epoch:
                    return delivery
        except queue.Empty:
            return None

    @property
    def consuming(self) -> bool:
        """Whether the broker delivers messages to us: False without a connection, and while one is
        being set up.
        """
        return self._consuming

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Acknowledge messages whose work is done: the broker deletes them."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_ack(tag))

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Requeue messages with `basic.nack`, which RabbitMQ does not count as a failure."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_nack(tag, requeue=True))

    def set_prefetch(self, prefetch: int) -> None:
        """Set the most unsettled messages of each queue, no fewer than the initial prefetch.
        Messages that were delivered already are kept. Any thread may call it.
        """

        def set_target() -> None:
            self._target_prefetch = prefetch
            self._adjust_prefetch()

        self._call_soon(set_target)

    def stop_taking(self, timeout_seconds: float) -> None:
        """Stop consuming and requeue what nobody took. What was taken can still be settled."""
        self._call_soon(self._cancel)
        self._stopped_taking.wait(timeout_seconds)
        untaken: list[Delivery] = []
        while not self._inbox.empty():
            untaken.append(self._inbox.get())
        self.give_back(untaken)

    # The owning thread.

    def _settle(self, deliveries: list[Delivery], settle: Any) -> None:
        def settle_all() -> None:
            for delivery in deliveries:
                if self._channel is not None and delivery.epoch == self._epoch:
                    self._unsettled[delivery.consumer] -= 1
                    self._unsettled_bytes[delivery.queue] -= len(delivery.body)
                    settle(self._channel, delivery.tag)
            for name in list(self._over_byte_limit):
                if self._unsettled_bytes[name] <= self._max_bytes / 2:
                    self.give_back(self._over_byte_limit.pop(name))
            self._adjust_prefetch()

        if deliveries:
            self._call_soon(settle_all)

    def _on_channel_ready(self, channel: Channel) -> None:
        self._epoch += 1
        self._unsettled.clear()
        self._unsettled_bytes.clear()
        self._over_byte_limit.clear()
        self._idle_checks = 0
        self._extra = {name: {} for name in self._queues}
        if not self._taking:
            self._in_service()
            return
        channel.add_on_cancel_callback(self._on_cancelled_by_broker)
        steps = [*map(self._consume, self._queues)]
        if self._on_fanout_message is not None:
            # A new name for each connection: after a network failure the broker may keep the old
            # connection, and its exclusive queue, for some time.
            listener = f"{self._listener}.{self._epoch}"
            queue = topology.listener_queue(self._fanout_exchange, listener)
            steps += [*listener_steps(queue, self._fanout_exchange), self._consume_fanout(queue)]
        run_in_order(channel, iter(steps), self._on_consuming)
        self._schedule_idle_check(self._epoch)

    def _on_consuming(self) -> None:
        self._consuming = True
        self._in_service()
        self._adjust_prefetch()

    def _adjust_prefetch(self) -> None:
        """Add or cancel one consumer, to approach the target prefetch.

        A quorum queue fixes a consumer's prefetch when it starts, so the number of consumers
        changes. A consumer is cancelled only while its prefetch is used up: then no message can be
        on its way to it, which pika would reject and the broker would count as an attempt.
        """
        channel = self._channel
        # One at a time: pika delays a request while another is open, but not a settlement.
        if channel is None or self._changing or not self._consuming or not self._taking:
            return
        for name, extra in self._extra.items():
            # The broker keeps a cancelled consumer until all of its messages are settled.
            cancelled = [
                held
                for tag, held in self._unsettled.items()
                if held and tag not in extra and tag.startswith(f"{name}{_TAG_SEPARATOR}")
            ]
            missing = self._target_prefetch - self._prefetch - sum(extra.values())
            room = missing - sum(cancelled)
            consumers_left = _MAX_CONSUMERS - 1 - len(extra) - len(cancelled)
            if room > 0 and consumers_left > 0:
                self._changing = True
                tag = f"{name}{_TAG_SEPARATOR}{next(self._numbers)}"
                extra[tag] = math.ceil(room / consumers_left)
                channel.basic_qos(prefetch_count=extra[tag])
                channel.basic_consume(
                    name, self._on_message, consumer_tag=tag, callback=self._on_changed
                )
                return
            # Cancel one if there is too much prefetch, or to replace it with a larger one.
            full = [tag for tag, prefetch in extra.items() if self._unsettled[tag] >= prefetch]
            if full and (missing < 0 or (room > 0 and not cancelled)):
                self._changing = True
                tag = _consumer_to_cancel([(extra[each], each) for each in full], -missing)
                del extra[tag]
                channel.basic_cancel(tag, callback=self._on_changed)
                return

    def _on_changed(self, _: Any) -> None:
        self._changing = False
        self._unsettled = +self._unsettled  # drops the tags without messages
        self._adjust_prefetch()

    def _consume(self, name: str) -> Any:
        def consume(channel: Channel, done: Callable[[Any], None]) -> None:
            channel.basic_qos(prefetch_count=self._prefetch_of.get(name, self._prefetch))
            # The tag starts with the queue's name, so that a delivery shows its queue.
            channel.basic_consume(name, self._on_message, consumer_tag=name, callback=done)

        return consume

    def _consume_fanout(self, name: str) -> Any:
        assert self._on_fanout_message is not None
        on_message = self._on_fanout_message
        return lambda channel, done: channel.basic_consume(
            name,
            lambda _channel, _method, _properties, body: on_message(body),
            auto_ack=True,
            callback=done,
        )

    def _on_channel_lost(self) -> None:
        # A new epoch: the broker has requeued all unsettled messages.
        self._epoch += 1
        self._consuming = self._changing = False

    def _schedule_idle_check(self, epoch: int) -> None:
        self._loop.call_later(_IDLE_CHECK_SECONDS, lambda: self._check_idle(epoch))

    def _check_idle(self, epoch: int) -> None:
        """Reconnect if messages wait in a queue but none is delivered.

        When a queue is deleted and declared again at once, the broker may forget our consumer
        without a notification, or believe that we still hold messages.
        """
        if epoch != self._epoch or not self._taking or self._channel is None:
            return
        idle = not self._received_since_check and self._unsettled.total() == 0
        self._received_since_check = False
        self._idle_checks = self._idle_checks + 1 if idle else 0
        if self._idle_checks == self._allowed_idle_checks:
            self._lost_because = f"nothing came for {self._idle_checks * _IDLE_CHECK_SECONDS:g} s"
            # Otherwise a large idle fleet would reconnect all the time.
            self._allowed_idle_checks = min(2 * self._allowed_idle_checks, _MAX_IDLE_CHECKS)
            self._restart_connection(routinely=True)
            return

        def on_counted(frame: Any) -> None:
            # A message that arrived meanwhile shows that the consumer works.
            if frame.method.message_count and not self._received_since_check:
                self._lost_because = f"messages wait in {frame.method.queue} and none is delivered"
                self._restart_connection()

        if idle:
            for name in self._queues:
                self._channel.queue_declare(name, passive=True, callback=on_counted)
        self._schedule_idle_check(epoch)

    def _on_message(self, _: Channel, method: Any, properties: Any, body: bytes) -> None:
        self._received_since_check = True
        self._allowed_idle_checks = _FIRST_IDLE_CHECKS
        self._unsettled[method.consumer_tag] += 1
        if method.redelivered:
            self._redelivered_metric.inc()
        queue = method.consumer_tag.partition(_TAG_SEPARATOR)[0]
        held = self._unsettled_bytes[queue]
        keep = not held or held + len(body) <= self._max_bytes
        delivery = Delivery(
            queue=queue,
            body=body if keep else b"",
            headers=properties.headers or {},
            message_id=properties.message_id or "",
            redelivered=method.redelivered,
            tag=method.delivery_tag,
            epoch=self._epoch,
            content_type=properties.content_type or "",
            kind=properties.type or "",
            consumer=method.consumer_tag,
        )
        if keep:
            self._unsettled_bytes[queue] += len(body)
            self._inbox.put(delivery)
        else:
            self._over_byte_limit[queue].append(delivery)
        self._adjust_prefetch()  # this may fill a consumer that is to be cancelled

    def _on_cancelled_by_broker(self, frame: Any) -> None:
        # After a queue is deleted, its connection stays open and nothing is delivered.
        log.warning("broker.cancelled", link=self._name, queue=frame.method.consumer_tag)
        self._lost_because = "the broker cancelled our consumer: its queue was deleted"
        self._restart_connection()

    def _cancel(self) -> None:
        if not self._taking and self._stopped_taking.is_set():
            return
        self._taking = False
        if self._channel is None:
            self._stopped_taking.set()
            return
        for name in list(self._over_byte_limit):
            self.give_back(self._over_byte_limit.pop(name))
        tags = [*self._queues, *(tag for extra in self._extra.values() for tag in extra)]
        consuming = set(tags)

        def cancelled(tag: str) -> None:
            consuming.discard(tag)
            if not consuming:
                self._stopped_taking.set()

        for tag in tags:
            self._channel.basic_cancel(tag, callback=lambda _, tag=tag: cancelled(tag))


def _consumer_to_cancel(full: Sequence[tuple[int, str]], too_many: int) -> str:
    """The largest consumer that is not too large to lose, else the smallest."""
    small_enough = [one for one in full if one[0] <= too_many]
    return (max(small_enough) if small_enough else min(full))[1]
