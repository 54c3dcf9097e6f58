"""Claims that are nowhere any more: in no queue and with no worker, though their run is unfinished.

They are so after a broker lost its disk, a store was restored from a backup, or a queue was purged.
Nobody would ever answer them.
"""

import time
from collections.abc import Callable

import structlog

from services.collector.demand import DemandEstimator
from services.contracts import topology
from services.store.store import Store

NOWHERE_SECONDS = 180.0
# After two heartbeats a broker notices that a worker was killed, and gives its claims to others.
_HEARTBEATS = 3
# Whoever did not look for so long, or did not hear from the broker, begins anew.
_PAUSE_SECONDS = 15.0
# What is in these is on its way.
_ON_THEIR_WAY = (
    topology.RUNS_QUEUE,
    topology.VERDICTS_QUEUE,
    topology.RETURNS_QUEUE,
    topology.DEAD_CLAIMS_QUEUE,
)

log = structlog.get_logger(__name__)


class Nowhere:
    """Finds them by what the broker, the workers and the store say, and notes it in the store."""

    def __init__(
        self,
        store: Store,
        directory: DemandEstimator,
        heartbeat_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._patience_seconds = max(NOWHERE_SECONDS, _HEARTBEATS * heartbeat_seconds)
        self._looked = clock()
        # By run, since when nothing of it is anywhere, and whether that is in the store.
        self._since: dict[str, float] = {}
        self._noted: set[str] = set()

    def note(self, run_ids: set[str]) -> None:
        """Something of these runs was committed."""
        for run_id in run_ids:
            self._since.pop(run_id, None)
        self._noted -= run_ids

    def look(self) -> None:
        """After each look of the directory. Raises StoreError."""
        now = self._clock()
        counts = self._directory.counts
        quiet = not any(counts.get(queue, 1) for queue in _ON_THEIR_WAY)
        heard = now - self._directory.counted_at <= _PAUSE_SECONDS
        if not quiet or not heard or now - self._looked > _PAUSE_SECONDS:
            self._since.clear()
        self._looked = now
        if not quiet or not heard:
            return
        still = self._directory.without_claims(self._directory.unfinished)
        self._since = {run_id: self._since.get(run_id, now) for run_id in still}
        found = {run for run, since in self._since.items() if now - since >= self._patience_seconds}
        new = found - self._noted
        if new:
            self._store.note_nowhere(new)
            log.error("claims.nowhere", runs=sorted(new), hint="`keepwarm status` says what to do")
        self._noted = found
