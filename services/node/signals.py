"""The first signal asks for an orderly end; a second SIGTERM or Ctrl-C ends at once."""

import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType

import structlog

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Slurm's and others' early warning (`--signal=B:USR1@60`). SIGTERM comes after it in any case, and
# is then the first of its kind. SIGHUP comes once from the kernel and once from the shell when a
# terminal is lost, so a second one must not end anything.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

log = structlog.get_logger(__name__)


def before_the_walltime_ends(stop: Callable[[], None], seconds: float | None) -> None:
    """Call `stop` in so many seconds; never where the time is not known."""
    if seconds is None:
        return

    def drain() -> None:
        log.info("walltime.ending")
        stop()

    log.info("walltime.known", drains_in_seconds=round(seconds))
    timer = threading.Timer(seconds, drain)
    timer.daemon = True
    timer.start()


def on_stop_signal(stop: Callable[[int], None]) -> None:
    """Call `stop` with the signal's number at the first one, on a thread of its own: a handler
    interrupts the main thread anywhere, also while it holds a lock that `stop` needs.

    Engines and nodes are on leashes, so that nothing stays behind when a second SIGTERM or Ctrl-C
    ends this process on the spot.
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
    for number in (*_STOP_SIGNALS, *_WARNINGS):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1)
            signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WARNINGS)  # main.py holds back what comes earlier
