"""How far the latest runs are, for whoever asks often and must not wait for the store."""

import threading
import time
from collections.abc import Iterable
from math import inf

from services.contracts.errors import StoreError
from services.store.progress import RunStatus, latest_statuses
from services.store.store import Store

_FRESH_SECONDS = 5.0
# At most a tenth of the time goes into counting, however long the store takes for it.
_PAUSES_PER_COUNT = 10.0
_WAIT_SECONDS = 0.5
_MOST_LOOKED_AT = 100
_MOST_SHOWN = 20


class RunCounts:
    """Counted by a thread of its own, and only when somebody asks. Any thread may ask."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._counted_at, self._due = -inf, -inf
        self._shown: list[RunStatus] = []
        self._complete: dict[str, RunStatus] = {}
        self._noted: set[str] | None = None
        """While a count is under way, the runs that moved meanwhile."""

    def note(self, run_ids: Iterable[str]) -> None:
        """Something of these runs was committed: they are counted again, complete or not."""
        with self._lock:
            for run_id in run_ids:
                self._complete.pop(run_id, None)
                if self._noted is not None:
                    self._noted.add(run_id)

    def latest(self) -> tuple[list[RunStatus], float]:
        """Runs that are not complete, of the others the latest; and how old that is, in seconds.

        A store that takes its time, or is not there, makes it older: it is waited for briefly.
        """
        with self._lock:
            thread = self._thread
            if (thread is None or not thread.is_alive()) and time.monotonic() >= self._due:
                thread = self._thread = threading.Thread(
                    target=self._count, name="run-counts", daemon=True
                )
                thread.start()
        if thread is not None:
            thread.join(_WAIT_SECONDS)
        return self._shown, time.monotonic() - self._counted_at

    def close(self) -> None:
        """Wait, not for long, for a count that is under way."""
        if self._thread is not None:
            self._thread.join(_WAIT_SECONDS)

    def _count(self) -> None:
        began = time.monotonic()
        with self._lock:
            complete, self._noted = dict(self._complete), set()
        try:
            statuses = latest_statuses(self._store, _MOST_LOOKED_AT, complete)
        except StoreError:
            statuses = None  # whoever commits says so
        ended = time.monotonic()
        with self._lock:
            if statuses is not None:
                self._complete = {
                    status.run_id: status
                    for status in statuses
                    if status.complete and status.run_id not in (self._noted or ())
                }
                self._shown = sorted(statuses, key=lambda status: status.complete)[:_MOST_SHOWN]
                self._counted_at = ended
            self._noted = None
            self._due = ended + max(_FRESH_SECONDS, _PAUSES_PER_COUNT * (ended - began))
