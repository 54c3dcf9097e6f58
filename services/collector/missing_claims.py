"""Detects missing claims: in no queue and at no worker, although their run is unfinished.

Claims go missing if a broker loses its disk, a store is restored from a backup, or a queue is
purged. They would never be answered.
"""

import time
from collections.abc import Callable

import structlog

from services.collector.demand import DemandEstimator
from services.contracts import topology
from services.store.store import Store

MISSING_SECONDS = 180.0
# A broker notices after two heartbeats that a worker was killed, and requeues its claims.
_HEARTBEATS = 3
# After a longer pause in the checks or in the broker's counts, the observation starts anew.
_PAUSE_SECONDS = 15.0
# Claims in these queues are not missing.
_TRANSIT_QUEUES = (
    topology.RUNS_QUEUE,
    topology.VERDICTS_QUEUE,
    topology.RETURNS_QUEUE,
    topology.DEAD_CLAIMS_QUEUE,
)

log = structlog.get_logger(__name__)


class MissingClaims:
    """Finds such runs by the counts of broker, workers and store, and marks them in the store."""

    def __init__(
        self,
        store: Store,
        demand: DemandEstimator,
        heartbeat_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._demand = demand
        self._clock = clock
        self._patience_seconds = max(MISSING_SECONDS, _HEARTBEATS * heartbeat_seconds)
        self._last_check = clock()
        # By run: since when it has no claims anywhere; and the runs that are marked in the store.
        self._since: dict[str, float] = {}
        self._marked: set[str] = set()

    def note(self, run_ids: set[str]) -> None:
        """Outcomes or announcements of these runs were committed."""
        for run_id in run_ids:
            self._since.pop(run_id, None)
        self._marked -= run_ids

    def check(self) -> None:
        """To be called after each `DemandEstimator.update`. Raises StoreError."""
        now = self._clock()
        counts = self._demand.counts
        empty = not any(counts.get(queue, 1) for queue in _TRANSIT_QUEUES)
        current = now - self._demand.counted_at <= _PAUSE_SECONDS
        if not empty or not current or now - self._last_check > _PAUSE_SECONDS:
            self._since.clear()
        self._last_check = now
        if not empty or not current:
            return
        without = self._demand.without_claims(self._demand.unfinished)
        self._since = {run_id: self._since.get(run_id, now) for run_id in without}
        missing = {
            run for run, since in self._since.items() if now - since >= self._patience_seconds
        }
        new = missing - self._marked
        if new:
            self._store.note_missing_claims(new)
            log.error("claims.missing", runs=sorted(new), hint="see `keepwarm status`")
        self._marked = missing
