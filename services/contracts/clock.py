"""A clock that does not count the time in which this process was stopped."""

import os
import threading
import time

_TICK_SECONDS = 0.5
# The clock's thread only sleeps: even on a busy machine it is never this late.
_MAX_LATE_SECONDS = 5.0


class _AwakeClock:
    """Reads the monotonic clock twice a second. If far more time has passed since the last reading,
    the process was stopped in between: by SIGSTOP (Slurm's suspend) or in a frozen cgroup.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticking = False
        self._last_read = time.monotonic()
        self._stopped = 0.0

    def __call__(self) -> float:
        with self._lock:
            if not self._ticking:
                self._ticking, self._last_read = True, time.monotonic()
                threading.Thread(target=self._tick, name="awake", daemon=True).start()
            now = time.monotonic()
            if now - self._last_read > _MAX_LATE_SECONDS:
                self._stopped += now - self._last_read - _TICK_SECONDS
            self._last_read = now
            return now - self._stopped

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self()


_clock = _AwakeClock()


def awake_seconds() -> float:
    """Seconds on a monotonic clock that does not advance while this process is stopped.

    For deadlines and idle times: a worker and its engine that were suspended together for an hour
    have not timed out.
    """
    return _clock()


def _reset_after_fork() -> None:
    """fork(2) does not copy the clock's thread into the child."""
    global _clock
    _clock = _AwakeClock()


os.register_at_fork(after_in_child=_reset_after_fork)
