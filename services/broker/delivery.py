"""A delivered message: its contents, its earlier deliveries, and its dead-lettering."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.broker.publisher import Outgoing
from services.contracts import topology
from services.contracts.errors import MessageInvalid
from services.contracts.wire import CONTENT_TYPE, Message, decode

# How often a quorum queue delivered the message before. Up to RabbitMQ 4.2 the first header counts
# every delivery; from 4.3 on it counts only failures (`basic.reject`, a lost channel), and the
# second counts every delivery
# (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling).
_EARLIER_DELIVERIES = ("x-delivery-count", "x-acquired-count")
_MAX_REASON_CHARS = 1_000
_MAX_COUNTED = 1_000_000
_MAX_DECLINED, _MAX_DECLINED_CHARS = 64, 256

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivered message. The broker delivers it again unless it is settled."""

    queue: str
    body: bytes
    headers: Mapping[str, Any]
    message_id: str
    redelivered: bool
    tag: int
    epoch: int
    content_type: str = CONTENT_TYPE
    kind: str = ""
    consumer: str = ""
    received_at: float = field(default_factory=time.monotonic, compare=False)
    """When it was delivered, by the monotonic clock."""

    @property
    def attempt(self) -> int:
        """1 for the first delivery; quorum queues count the earlier ones. An invalid count is
        ignored.
        """
        counts = [self.headers.get(name) for name in _EARLIER_DELIVERIES]
        return 1 + max(
            (count for count in counts if isinstance(count, int) and 0 <= count < 2**31 - 1),
            default=0,
        )

    def message(self, kind: type[M]) -> M:
        """The decoded message. Raises MessageInvalid with the reason."""
        if self.content_type != CONTENT_TYPE:
            raise MessageInvalid(f"its content type is {self.content_type!r}, not {CONTENT_TYPE}")
        if self.kind != kind.wire_type:
            raise MessageInvalid(f"its type is {self.kind!r}, not {kind.wire_type}")
        return decode(kind, self.body)

    @property
    def failures(self) -> int:
        """How many engine failures its claims were part of. Raises MessageInvalid."""
        return self._count(topology.FAILURES_HEADER)

    @property
    def declined(self) -> tuple[str, ...]:
        """The engines that could not answer its claims, each preceded by its error message.

        Raises MessageInvalid.
        """
        entries = self.headers.get(topology.DECLINED_HEADER, [])
        if (
            not isinstance(entries, list)
            or len(entries) > _MAX_DECLINED
            or not all(isinstance(e, str) and len(e) <= _MAX_DECLINED_CHARS for e in entries)
        ):
            raise MessageInvalid(f"its header {topology.DECLINED_HEADER} is not a list of engines")
        return tuple(entries)

    @property
    def waited_seconds(self) -> int:
        """How long its claims have waited for another engine. Raises MessageInvalid."""
        return self._count(topology.WAITED_HEADER)

    @property
    def history(self) -> dict[str, Any]:
        """The headers that record what happened to its claims so far. Raises MessageInvalid."""
        return history_headers(self.failures, self.declined, self.waited_seconds)

    def _count(self, header: str) -> int:
        count = self.headers.get(header, 0)
        if not isinstance(count, int) or not 0 <= count < _MAX_COUNTED:
            raise MessageInvalid(f"its header {header} is not a valid count")
        return count

    def as_dead_message(
        self, reason: str, on_confirmed: Callable[[], None], *, origin: str | None = None
    ) -> Outgoing:
        """The message, addressed to `dead-messages`, with headers for the reason and the queue that
        it came from: this delivery's, or `origin`.
        """
        return Outgoing(
            topology.DEAD_EXCHANGE,
            topology.DEAD_MESSAGES_QUEUE,
            self.body,
            message_id=self.message_id,
            kind=self.kind,
            headers={
                topology.REASON_HEADER: reason[:_MAX_REASON_CHARS],
                topology.ORIGIN_HEADER: self.queue if origin is None else origin,
            },
            on_confirmed=on_confirmed,
        )


def history_headers(
    failures: int, declined: Sequence[str] = (), waited_seconds: int = 0
) -> dict[str, Any]:
    """The headers of returned claims; see `Delivery.failures`, `declined` and `waited_seconds`."""
    headers: dict[str, Any] = {topology.FAILURES_HEADER: failures}
    if declined:
        headers[topology.DECLINED_HEADER] = list(declined[-_MAX_DECLINED:])
        headers[topology.WAITED_HEADER] = waited_seconds
    return headers
