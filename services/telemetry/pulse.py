"""Whether a main loop moves: it beats, and somebody looks how long ago that was."""

from collections.abc import Callable

from services.contracts.clock import awake

STUCK_SECONDS = 120.0
"""Longer than whatever a loop may have to wait for in one piece: a broker, a database, a hub."""


class Watchdog:
    """Beaten by one thread, looked at by any."""

    def __init__(self, clock: Callable[[], float] = awake) -> None:
        self._clock = clock
        self._beaten = clock()

    def beat(self) -> None:
        self._beaten = self._clock()

    @property
    def liveness_error(self) -> str | None:
        """In words, how long the loop has stood still, if that is too long."""
        seconds = self._clock() - self._beaten
        return f"its main loop stood still for {seconds:.0f} s" if seconds > STUCK_SECONDS else None
