"""Signals: the first one asks for an orderly end, a second SIGTERM or Ctrl-C ends at once."""

import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Early warnings of Slurm and other batch systems (`--signal=B:USR1@60`). SIGTERM follows, and must
# not count as a second signal. SIGHUP comes twice when a terminal is lost, from the kernel and from
# the shell, so a second one must not end the process.
_WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def on_stop_signal(stop: Callable[[int], None]) -> None:
    """Call `stop` with the number of the first signal, on a thread of its own: a handler may
    interrupt the main thread while it holds a lock that `stop` needs.

    A second SIGTERM or Ctrl-C ends this process at once. Engines and RabbitMQ nodes are supervised
    processes, so they end with it.
    """
    came: list[int] = []
    first: queue.SimpleQueue[int] = queue.SimpleQueue()  # its `put` is safe in a handler

    def handle(number: int, _: FrameType | None) -> None:
        if number in _STOP_SIGNALS and any(earlier in _STOP_SIGNALS for earlier in came):
            os._exit(128 + number)
        came.append(number)
        if len(came) == 1:
            first.put(number)

    threading.Thread(target=lambda: stop(first.get()), name="signals", daemon=True).start()
    for number in (*_STOP_SIGNALS, *_WARNING_SIGNALS):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1)
            signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WARNING_SIGNALS)  # main.py blocks them until now
