"""The statuses of the latest runs, cached for scrapes, which must not wait for the store."""

import threading
import time
from collections.abc import Iterable
from math import inf

from services.contracts.errors import StoreError
from services.store.progress import RunStatus, latest_statuses
from services.store.store import Store

_FRESH_SECONDS = 5.0
# At most a tenth of the time is spent counting, even if the store is slow.
_PAUSES_PER_COUNT = 10.0
_WAIT_SECONDS = 0.5
_MAX_LOOKED_AT = 100
_MAX_SHOWN = 20


class RunStatusCache:
    """Reads the statuses in a thread of its own, only on demand. Any thread may call it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._counted_at, self._due = -inf, -inf
        self._shown: list[RunStatus] = []
        self._complete: dict[str, RunStatus] = {}
        self._noted: set[str] | None = None
        """During a count, the runs that changed meanwhile; otherwise None."""

    def note(self, run_ids: Iterable[str]) -> None:
        """Count these runs again, even if they are complete: something of them was committed."""
        with self._lock:
            for run_id in run_ids:
                self._complete.pop(run_id, None)
                if self._noted is not None:
                    self._noted.add(run_id)

    def latest(self) -> tuple[list[RunStatus], float]:
        """The incomplete runs, then the latest complete ones; and the age of these, in seconds.

        It waits only briefly for the store: if that is slow or gone, the statuses are older.
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
        """Wait briefly for a count in progress."""
        if self._thread is not None:
            self._thread.join(_WAIT_SECONDS)

    def _count(self) -> None:
        began = time.monotonic()
        with self._lock:
            complete, self._noted = dict(self._complete), set()
        try:
            statuses = latest_statuses(self._store, _MAX_LOOKED_AT, complete)
        except StoreError:
            statuses = None  # the next commit logs the error
        ended = time.monotonic()
        with self._lock:
            if statuses is not None:
                self._complete = {
                    status.run_id: status
                    for status in statuses
                    if status.complete and status.run_id not in (self._noted or ())
                }
                self._shown = sorted(statuses, key=lambda status: status.complete)[:_MAX_SHOWN]
                self._counted_at = ended
            self._noted = None
            self._due = ended + max(_FRESH_SECONDS, _PAUSES_PER_COUNT * (ended - began))
