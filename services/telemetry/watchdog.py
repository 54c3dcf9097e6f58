"""Watchdogs: how long a main loop has been stalled, and how long a lock has been held."""

import threading
from collections.abc import Callable

from services.contracts.clock import awake_seconds

STALLED_SECONDS = 120.0
"""Longer than any single wait of a loop, for a broker, a database or a hub."""


class Watchdog:
    """`beat` is called by one thread; any thread may read `liveness_error`."""

    def __init__(self, clock: Callable[[], float] = awake_seconds) -> None:
        self._clock = clock
        self._last_beat = clock()

    def beat(self) -> None:
        self._last_beat = self._clock()

    @property
    def liveness_error(self) -> str | None:
        """How long the loop has been stalled, if that is too long; otherwise None."""
        seconds = self._clock() - self._last_beat
        return (
            f"the main loop has stalled for {seconds:.0f} s" if seconds > STALLED_SECONDS else None
        )


class TimedLock:
    """A lock that tells how long its holder has had it. Time in which this process was stopped does
    not count.
    """

    def __init__(self, clock: Callable[[], float] = awake_seconds) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held_since: float | None = None

    @property
    def held_seconds(self) -> float:
        """0 while it is free. Any thread may read it."""
        since = self._held_since
        return 0.0 if since is None else self._clock() - since

    def __enter__(self) -> None:
        self._lock.acquire()
        self._held_since = self._clock()

    def __exit__(self, *_: object) -> None:
        self._held_since = None
        self._lock.release()
