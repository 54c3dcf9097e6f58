"""The fleet: how many workers serve each context, as they say themselves."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from math import inf

from services.contracts import WorkerReport
from services.contracts.presence import FORGOTTEN_SECONDS, REPORT_SECONDS

MAX_WORKERS = 100_000
"""More cannot be real; those that were silent for longest are forgotten first."""
_PAUSE_SECONDS = FORGOTTEN_SECONDS - REPORT_SECONDS


class Fleet:
    """The workers that serve a context, by the latest report of each.

    Nothing of it is stored: workers report again and again, and `REPORT_SECONDS` after a collector
    began to listen it has heard from all of them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # reports come on a link's thread
        self._began = self._listened = -inf
        # By worker, its context and when it said so; who is silent for longest comes first.
        self._serving: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._on: Counter[str] = Counter()

    def heard_all(self) -> bool:
        """Whether every worker that is there has had the time to say so."""
        with self._lock:
            return self._now() - self._began >= REPORT_SECONDS

    def note(self, report: WorkerReport) -> None:
        """The worker's latest word: what it said before is forgotten."""
        with self._lock:
            now = self._now()
            self._forget(report.worker_id)
            if report.state == "serving" and report.context_id is not None:
                if len(self._serving) >= MAX_WORKERS:
                    self._forget(next(iter(self._serving)))
                self._serving[report.worker_id] = report.context_id, now
                self._on[report.context_id] += 1

    def workers_on(self, context_id: str) -> int:
        """How many workers serve the context now."""
        with self._lock:
            latest_gone = self._now() - FORGOTTEN_SECONDS
            while self._serving:
                worker_id, (_, heard) = next(iter(self._serving.items()))
                if heard > latest_gone:
                    break
                self._forget(worker_id)
            return self._on[context_id]

    def _now(self) -> float:
        """Whoever did not listen, waiting for a store or a broker, begins anew: a silence of that
        time is nobody's.
        """
        now = self._clock()
        if now - self._listened > _PAUSE_SECONDS:
            self._began = now
        self._listened = now
        return now

    def _forget(self, worker_id: str) -> None:
        if worker_id in self._serving:
            context_id, _ = self._serving.pop(worker_id)
            self._on[context_id] -= 1
            if not self._on[context_id]:
                del self._on[context_id]
