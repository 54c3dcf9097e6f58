"""Time in which this process could run: what deadlines for others and idle times are counted in."""

import os
import threading
import time

_TICK_SECONDS = 0.5
# A thread that only sleeps is never this late, however busy the machine is.
_STOPPED_SECONDS = 5.0


class _AwakeClock:
    """Looks at the monotonic clock twice a second. Where far more than that has passed since the
    last look, the process was stopped: by SIGSTOP (Slurm's suspend), or in a frozen cgroup.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticking = False
        self._looked = time.monotonic()
        self._stopped = 0.0

    def __call__(self) -> float:
        with self._lock:
            if not self._ticking:
                self._ticking, self._looked = True, time.monotonic()
                threading.Thread(target=self._tick, name="awake", daemon=True).start()
            now = time.monotonic()
            if now - self._looked > _STOPPED_SECONDS:
                self._stopped += now - self._looked - _TICK_SECONDS
            self._looked = now
            return now - self._stopped

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self()


_clock = _AwakeClock()


def awake() -> float:
    """Seconds on a monotonic clock that stands still while this process is stopped.

    A worker and its engine that were suspended for an hour have not kept each other waiting.
    """
    return _clock()


def _begin_anew() -> None:
    """A child of fork(2) has no thread that looks."""
    global _clock
    _clock = _AwakeClock()


os.register_at_fork(after_in_child=_begin_anew)
