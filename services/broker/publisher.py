"""Publishing with confirms: each message is kept until the broker has confirmed it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pika
import structlog
from pika.channel import Channel
from pika.spec import Basic

from services.broker.address import BrokerAddress
from services.broker.declarations import Declares
from services.broker.link import Link
from services.broker.metrics import UNCONFIRMED
from services.contracts.errors import BrokerUnreachable
from services.contracts.wire import CONTENT_TYPE, Message, encode

_RESEND_DELAY_SECONDS = 0.5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish. `kind` is the wire type of its contract.

    A message that no queue takes is sent again, unless it is `transient`.
    """

    exchange: str
    routing_key: str
    body: bytes
    message_id: str = ""
    kind: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    on_confirmed: Callable[[], None] | None = None
    transient: bool = False

    @classmethod
    def of(cls, message: Message, exchange: str, routing_key: str, **rest: Any) -> Self:
        """Encode `message`. Raises MessageInvalid if it is too large."""
        return cls(
            exchange,
            routing_key,
            encode(message),
            kind=message.wire_type,
            transient=message.transient,
            **rest,
        )


class Publisher(Link):
    """Sends persistent messages and keeps each until it is confirmed.

    At most `window` messages are unconfirmed; then `publish` waits, so that a slow or blocked
    broker slows the caller down and memory stays bounded. After a lost connection all unconfirmed
    messages are sent again with the same `message_id`: a message may arrive twice, but is not lost.
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        *,
        window: int,
        declares: Declares = Declares(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(address, name, declares)
        self._free = threading.Semaphore(window)
        self._pending = 0
        # Read at each scrape, so that it costs nothing per message.
        UNCONFIRMED.labels(name).set_function(lambda: self._pending)
        self._idle = threading.Condition()
        self._outbox: deque[Outgoing] = deque()
        self._wake_requested = False
        # Owned by the link's thread:
        self._unconfirmed: dict[int, Outgoing] = {}
        self._returned: set[int] = set()
        self._last_tag = 0

    def also_declare(self, context_id: str) -> None:
        """Declare the context's claims queue as well, if it is missing."""
        if context_id not in self._declares.context_ids:
            known = (*self._declares.context_ids, context_id)
            self._declares = replace(self._declares, context_ids=known)

    def publish(self, message: Outgoing) -> None:
        """Queue a message; waits while the window is full. Any thread but the link's own.

        `on_confirmed` is called on the link's thread once the broker has confirmed the message.
        Raises BrokerError if the link has ended, or is closed while the window is full.
        """
        self.raise_if_dead()
        while not self._free.acquire(timeout=1.0):
            self.raise_if_dead()
            if self._closing:  # an alarm can delay the broker's answer to the close
                raise BrokerUnreachable(f"the link {self._name} is closed")
        self._enqueue(message)

    def offer(self, message: Outgoing) -> bool:
        """Like `publish`, but never waits: for threads that must not block, and for messages that
        are of use only now. False if the broker accepts nothing, or the window is full.
        """
        if self.readiness_error is not None or not self._free.acquire(blocking=False):
            return False
        self._enqueue(message)
        return True

    def _enqueue(self, message: Outgoing) -> None:
        with self._idle:
            self._pending += 1
        self._outbox.append(message)
        if not self._wake_requested:
            self._wake_requested = True
            self._call_soon(self._send_outbox)

    @property
    def pending(self) -> int:
        """Messages that are not confirmed yet."""
        return self._pending

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until everything is confirmed. Raises BrokerUnreachable after the time-out."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._idle:
            while self._pending:
                self.raise_if_dead()
                if deadline is not None and time.monotonic() > deadline:
                    raise BrokerUnreachable(
                        f"{self._pending} messages were not confirmed by {self._address} within "
                        f"{timeout_seconds:g} s; send them again"
                    )
                self._idle.wait(0.5)

    # The owning thread.

    def _on_channel_ready(self, channel: Channel) -> None:
        self._last_tag = 0
        channel.add_on_return_callback(self._on_returned)
        channel.confirm_delivery(self._on_confirm)
        self._in_service()
        self._send_outbox()

    def _on_channel_lost(self) -> None:
        self._outbox.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed.clear()
        self._returned.clear()

    def _send_outbox(self) -> None:
        self._wake_requested = False
        while self._outbox and self._channel is not None:
            message = self._outbox.popleft()
            self._last_tag += 1
            self._unconfirmed[self._last_tag] = message
            self._channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                pika.BasicProperties(
                    content_type=CONTENT_TYPE,
                    type=message.kind,
                    delivery_mode=pika.DeliveryMode.Transient
                    if message.transient
                    else pika.DeliveryMode.Persistent,
                    message_id=message.message_id,
                    # Identifies returned messages: message ids may be absent or not unique.
                    correlation_id=str(self._last_tag),
                    headers=dict(message.headers),
                ),
                mandatory=not message.transient,
            )

    def _on_confirm(self, frame: Any) -> None:
        tag, multiple = frame.method.delivery_tag, frame.method.multiple
        # Tags increase, and a dict keeps its insertion order.
        tags = [tag]
        if multiple:
            tags = []
            for known in self._unconfirmed:
                if known > tag:
                    break
                tags.append(known)
        tags = [known for known in tags if known in self._unconfirmed]
        returned = self._returned.intersection(tags)
        # Messages that were returned but are not confirmed yet stay in `_returned`.
        self._returned -= returned
        unroutable = [self._unconfirmed[known] for known in tags if known in returned]
        settled = [self._unconfirmed.pop(known) for known in tags]
        if isinstance(frame.method, Basic.Nack):
            log.warning(
                "broker.nacked",
                link=self._name,
                messages=len(settled),
                hint="a queue is full, by a policy's max-length, or has lost most of its replicas; "
                "the messages are sent again until it accepts them",
            )
            self._send_later(settled)
            return
        if unroutable:
            self._on_unroutable(unroutable)
        self._confirm(
            [message for known, message in zip(tags, settled, strict=True) if known not in returned]
        )

    def _on_unroutable(self, messages: Sequence[Outgoing]) -> None:
        """The queue is missing. A publisher that may declare it reconnects and declares it; others
        send again until it exists.
        """
        keys = sorted({message.routing_key for message in messages})
        log.warning("broker.unroutable", link=self._name, messages=len(messages), keys=keys)
        if self._declares.core == "never":
            self._send_later(messages)
            return
        self._core_is_missing = True
        self._lost_because = f"no queue is bound for {', '.join(keys)}"
        self._outbox.extendleft(reversed(messages))
        self._restart_connection()

    def _confirm(self, messages: Sequence[Outgoing]) -> None:
        for message in messages:
            if message.on_confirmed is not None:
                message.on_confirmed()
        if messages:
            self._free.release(len(messages))
            with self._idle:
                self._pending -= len(messages)
                self._idle.notify_all()

    def _send_later(self, messages: Sequence[Outgoing]) -> None:
        def requeue() -> None:
            self._outbox.extendleft(reversed(messages))
            self._send_outbox()

        self._loop.call_later(_RESEND_DELAY_SECONDS, requeue)

    def _on_returned(self, _: Channel, method: Any, properties: Any, __: bytes) -> None:
        # The broker confirms a returned message right after this; `_on_confirm` then sends it
        # again.
        self._returned.add(int(properties.correlation_id))
