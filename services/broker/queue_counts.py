"""How long queues are, asked where the answer can do no harm."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

Counts = Mapping[str, int]
"""By queue, the messages that wait for a consumer, unacknowledged ones not counted; a queue that
does not exist is not in it.
"""


def count_queues(connection: Any, queues: Iterable[str], done: Callable[[Counts], None]) -> None:
    """Ask for one queue after the other, then call `done`; on the connection's own thread.

    It takes a channel of its own: where a queue does not exist, the broker closes the channel that
    asked, and the next one is asked for on a new one. Never calls `done` when the connection is
    lost meanwhile.
    """
    waiting = list(queues)
    counts: dict[str, int] = {}

    def open_channel() -> None:
        if connection.is_open:  # not on its way out
            connection.channel(on_open_callback=opened)

    def opened(channel: Channel) -> None:
        channel.add_on_close_callback(closed)
        ask(channel)

    def ask(channel: Channel) -> None:
        if not channel.is_open:
            return
        if waiting:
            channel.queue_declare(
                waiting[0], passive=True, callback=lambda frame: answered(channel, frame)
            )
        else:
            channel.close()
            done(counts)

    def answered(channel: Channel, frame: Any) -> None:
        counts[waiting.pop(0)] = frame.method.message_count
        ask(channel)

    def closed(_: Channel, reason: BaseException) -> None:
        if waiting and isinstance(reason, ChannelClosedByBroker):
            waiting.pop(0)
            open_channel()

    open_channel()
