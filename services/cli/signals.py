"""The first SIGTERM or Ctrl-C asks for an orderly end; the second ends at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType

DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def on_stop_signal(stop: Callable[[int], None]) -> None:
    """Call `stop` with the signal's number at the first one. Engines and nodes are on leashes, so
    that nothing stays behind when the second one ends this process on the spot.
    """
    came: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        stop(number)

    for number in DRAIN_SIGNALS:
        signal.signal(number, handle)
