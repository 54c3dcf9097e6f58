"""Taking messages: a small prefetch, heartbeats while the work lasts, and a drain."""

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
from services.broker.delivery import Delivery
from services.broker.link import Link
from services.broker.metrics import REDELIVERED
from services.broker.topology import Declares, listen, run_in_order
from services.contracts import topology

_LOOK_SECONDS = 15.0
# After so many looks at which nothing had come, and twice as many each time, it connects anew.
_FIRST_IDLE_LOOKS, _MOST_IDLE_LOOKS = 4, 64
_NUMBER_MARK = "#"
# Of one channel on one queue. When a channel is gone, RabbitMQ takes its messages back consumer by
# consumer; with more than 32 of them, it may do so in another order as it reads its log again after
# a crash, and then forgets messages that nobody settled (docs/decisions/0026). It may be a few
# settlements behind us, and has those that have ended until then.
_MOST_CONSUMERS = 24

log = structlog.get_logger(__name__)


class Consumer(Link):
    """Takes messages from `queues`, at most `prefetch` unsettled ones from each (or `prefetch_of`
    it), or as many more as `set_prefetch` says.

    AMQP bounds messages, not bytes, so with `most_bytes` a message that comes while unsettled ones
    of its queue hold that much is not kept: the broker has it back, and sends it again, once half
    of them are settled. At least one message of each queue is kept, whatever its size.

    Deliveries wait in memory until `take`; whoever took one settles it from any thread with
    `acknowledge` or `give_back`, minutes later if need be: the link's own thread keeps the
    heartbeats going. A delivery from before a lost connection is settled in vain, on purpose: the
    broker has already given it to someone. `on_notice` hears what the fanout `hears` says,
    notices unless told otherwise, on the link's thread.
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        *,
        queues: Sequence[str],
        prefetch: int,
        prefetch_of: Mapping[str, int] = MappingProxyType({}),
        most_bytes: int | None = None,
        declares: Declares = Declares(),  # noqa: B008  (frozen)
        on_notice: Callable[[bytes], None] | None = None,
        listener: str = "",
        hears: str = topology.NOTICES_EXCHANGE,
    ) -> None:
        super().__init__(address, name, declares)
        self._queues = tuple(queues)
        self._prefetch = self._wanted_prefetch = prefetch
        self._prefetch_of = prefetch_of
        self._most_bytes = math.inf if most_bytes is None else most_bytes
        self._on_notice = on_notice
        self._listener = listener
        self._hears = hears
        self._redelivered_metric = REDELIVERED.labels(name)
        # No SimpleQueue: until Python 3.13 its `get` waits for ever where a signal's handler runs
        # past the time-out, and a service that was told to end would not.
        self._inbox: queue.Queue[Delivery] = queue.Queue()
        self._taking = True
        self._stopped_taking = threading.Event()
        self._epoch = 0
        self._came_since_the_look = False
        self._idle_looks = 0
        self._patient_looks = _FIRST_IDLE_LOOKS
        # By the consumer's tag:
        self._unsettled: Counter[str] = Counter()
        # By queue, the bytes of what is unsettled, and the messages that were not kept.
        self._held_bytes: Counter[str] = Counter()
        self._not_kept: defaultdict[str, list[Delivery]] = defaultdict(list)
        # By queue, the prefetch of each consumer that is there beside the first.
        self._extra: dict[str, dict[str, int]] = {name: {} for name in queues}
        self._numbers = count(1)
        self._consuming = self._changing = False

    def take(self, timeout_seconds: float) -> Delivery | None:
        """The next message, or None when none came in time. Raises BrokerError on a dead link."""
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
        """Whether the broker hands us what it has; not so without a connection, and while one is
        being set up.
        """
        return self._consuming

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """They are done: the broker may forget them."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_ack(tag))

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Return them unharmed, for someone else: `basic.nack`, which never counts as a failure."""
        self._settle(list(deliveries), lambda channel, tag: channel.basic_nack(tag, requeue=True))

    def set_prefetch(self, prefetch: int) -> None:
        """Have at most so many unsettled messages from each queue, but no fewer than at first. What
        is in our hands already stays there. Any thread.
        """

        def want() -> None:
            self._wanted_prefetch = prefetch
            self._fit_prefetch()

        self._call_soon(want)

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
                    self._unsettled[delivery.consumer] -= 1
                    self._held_bytes[delivery.queue] -= len(delivery.body)
                    settle(self._channel, delivery.tag)
            for name in list(self._not_kept):
                if self._held_bytes[name] <= self._most_bytes / 2:
                    self.give_back(self._not_kept.pop(name))
            self._fit_prefetch()  # there may be room now

        if deliveries:
            self._call_soon(now)

    def _on_channel_ready(self, channel: Channel) -> None:
        self._epoch += 1
        self._unsettled.clear()
        self._held_bytes.clear()
        self._not_kept.clear()
        self._idle_looks = 0
        self._extra = {name: {} for name in self._queues}
        if not self._taking:
            self._in_service()
            return
        channel.add_on_cancel_callback(self._on_cancelled_by_broker)
        steps = [*map(self._consume, self._queues)]
        if self._on_notice is not None:
            # A name for each connection: after a network failed, the broker may hold the old
            # connection, and the queue that is its own, for some time.
            queue = topology.listener_queue(self._hears, f"{self._listener}.{self._epoch}")
            steps += [*listen(queue, self._hears), self._consume_notices(queue)]
        run_in_order(channel, iter(steps), self._on_consuming)
        self._look_later(self._epoch)

    def _on_consuming(self) -> None:
        self._consuming = True
        self._in_service()
        self._fit_prefetch()

    def _fit_prefetch(self) -> None:
        """A quorum queue fixes a consumer's prefetch when it begins; so what changes is how many
        consumers there are. One is ended only while it holds all that it may: then no message can
        be on its way to it, which pika would reject, and the broker count as an attempt.
        """
        channel = self._channel
        # One at a time: pika holds a request back while another is open, and settling overtakes it.
        if channel is None or self._changing or not self._consuming or not self._taking:
            return
        for name, extra in self._extra.items():
            # The broker has one that has ended until all that it holds is settled.
            ended = [
                held
                for tag, held in self._unsettled.items()
                if held and tag not in extra and tag.startswith(f"{name}{_NUMBER_MARK}")
            ]
            missing = self._wanted_prefetch - self._prefetch - sum(extra.values())
            room = missing - sum(ended)
            places = _MOST_CONSUMERS - 1 - len(extra) - len(ended)
            if room > 0 and places > 0:
                self._changing = True
                tag = f"{name}{_NUMBER_MARK}{next(self._numbers)}"
                extra[tag] = math.ceil(room / places)
                channel.basic_qos(prefetch_count=extra[tag])
                channel.basic_consume(
                    name, self._on_message, consumer_tag=tag, callback=self._on_changed
                )
                return
            # One that is too large, or has to be larger, makes way for another.
            full = [tag for tag, prefetch in extra.items() if self._unsettled[tag] >= prefetch]
            if full and (missing < 0 or (room > 0 and not ended)):
                self._changing = True
                ending = _to_end([(extra[tag], tag) for tag in full], -missing)
                del extra[ending]
                channel.basic_cancel(ending, callback=self._on_changed)
                return

    def _on_changed(self, _: Any) -> None:
        self._changing = False
        self._unsettled = +self._unsettled  # forget the tags that have ended
        self._fit_prefetch()

    def _consume(self, name: str) -> Any:
        def consume(channel: Channel, done: Callable[[Any], None]) -> None:
            channel.basic_qos(prefetch_count=self._prefetch_of.get(name, self._prefetch))
            # The tag begins with the queue's name, so that a delivery tells where it is from.
            channel.basic_consume(name, self._on_message, consumer_tag=name, callback=done)

        return consume

    def _consume_notices(self, name: str) -> Any:
        assert self._on_notice is not None
        hear = self._on_notice
        return lambda channel, done: channel.basic_consume(
            name,
            lambda _channel, _method, _properties, body: hear(body),
            auto_ack=True,
            callback=done,
        )

    def _on_channel_lost(self) -> None:
        # An epoch without a channel: whatever is in hand is the broker's again.
        self._epoch += 1
        self._consuming = self._changing = False

    def _look_later(self, epoch: int) -> None:
        self._loop.call_later(_LOOK_SECONDS, lambda: self._look(epoch))

    def _look(self, epoch: int) -> None:
        """A consumer can be forgotten without a word, when its queue was deleted and made again at
        once. Then messages wait, our hands are empty, and nothing comes; or the broker believes
        that we have them, and only a new connection tells it otherwise.
        """
        if epoch != self._epoch or not self._taking or self._channel is None:
            return
        idle = not self._came_since_the_look and self._unsettled.total() == 0
        self._came_since_the_look = False
        self._idle_looks = self._idle_looks + 1 if idle else 0
        if self._idle_looks == self._patient_looks:
            self._lost_because = f"nothing came for {self._idle_looks * _LOOK_SECONDS:g} s"
            # A large fleet that waits for claims would else connect anew all the time.
            self._patient_looks = min(2 * self._patient_looks, _MOST_IDLE_LOOKS)
            self._restart_connection(routinely=True)
            return

        def looked(frame: Any) -> None:
            # What came while we asked shows that all is well.
            if frame.method.message_count and not self._came_since_the_look:
                self._lost_because = f"messages wait in {frame.method.queue} and none comes"
                self._restart_connection()

        if idle:
            for name in self._queues:
                self._channel.queue_declare(name, passive=True, callback=looked)
        self._look_later(epoch)

    def _on_message(self, _: Channel, method: Any, properties: Any, body: bytes) -> None:
        self._came_since_the_look = True
        self._patient_looks = _FIRST_IDLE_LOOKS
        self._unsettled[method.consumer_tag] += 1
        if method.redelivered:
            self._redelivered_metric.inc()
        queue = method.consumer_tag.partition(_NUMBER_MARK)[0]
        held = self._held_bytes[queue]
        keep = not held or held + len(body) <= self._most_bytes
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
            self._held_bytes[queue] += len(body)
            self._inbox.put(delivery)
        else:
            self._not_kept[queue].append(delivery)
        self._fit_prefetch()  # it may have come to a consumer that is not wanted any more

    def _on_cancelled_by_broker(self, frame: Any) -> None:
        # A deleted queue leaves a connection that is open and silent.
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
        for name in list(self._not_kept):
            self.give_back(self._not_kept.pop(name))
        tags = [*self._queues, *(tag for extra in self._extra.values() for tag in extra)]
        waiting = set(tags)

        def cancelled(tag: str) -> None:
            waiting.discard(tag)
            if not waiting:
                self._stopped_taking.set()

        for tag in tags:
            self._channel.basic_cancel(tag, callback=lambda _, tag=tag: cancelled(tag))


def _to_end(full: Sequence[tuple[int, str]], too_many: int) -> str:
    """The largest that leaves enough, or else the smallest."""
    fitting = [one for one in full if one[0] <= too_many]
    return (max(fitting) if fitting else min(full))[1]
