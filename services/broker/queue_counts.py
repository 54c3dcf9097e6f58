"""The lengths of queues, requested on a channel of their own."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

Counts = Mapping[str, int]
"""The messages waiting in each queue, without unacknowledged ones. A queue that does not exist is
not in it.
"""


def count_queues(connection: Any, queues: Iterable[str], done: Callable[[Counts], None]) -> None:
    """Count one queue after the other, then call `done`; on the connection's own thread.

    It uses its own channels: the broker closes a channel that asks for a missing queue, and the
    next queue is counted on a new one. `done` is not called if the connection is lost meanwhile.
    """
    remaining = list(queues)
    counts: dict[str, int] = {}

    def open_channel() -> None:
        if connection.is_open:  # not closing
            connection.channel(on_open_callback=on_opened)

    def on_opened(channel: Channel) -> None:
        channel.add_on_close_callback(on_closed)
        count_next(channel)

    def count_next(channel: Channel) -> None:
        if not channel.is_open:
            return
        if remaining:
            channel.queue_declare(
                remaining[0], passive=True, callback=lambda frame: on_counted(channel, frame)
            )
        else:
            channel.close()
            done(counts)

    def on_counted(channel: Channel, frame: Any) -> None:
        counts[remaining.pop(0)] = frame.method.message_count
        count_next(channel)

    def on_closed(_: Channel, reason: BaseException) -> None:
        if remaining and isinstance(reason, ChannelClosedByBroker):
            remaining.pop(0)
            open_channel()

    open_channel()
