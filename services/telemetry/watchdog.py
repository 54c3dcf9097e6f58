"""A watchdog for a main loop: the loop calls `beat`, and probes check how long ago that was."""

from collections.abc import Callable

from services.contracts.clock import awake

STALLED_SECONDS = 120.0
"""Longer than any single wait of a loop, for a broker, a database or a hub."""


class Watchdog:
    """`beat` is called by one thread; any thread may read `liveness_error`."""

    def __init__(self, clock: Callable[[], float] = awake) -> None:
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
