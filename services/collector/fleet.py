"""The fleet: which workers there are, and how many serve each context, as they say themselves."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from math import inf

from services.collector.metrics import PREEMPTIONS
from services.contracts import WorkerHeartbeat
from services.contracts.heartbeats import FORGOTTEN_SECONDS, HEARTBEAT_SECONDS

MAX_WORKERS = 100_000
"""More cannot be real; those that were silent for longest are forgotten first."""
_PAUSE_SECONDS = FORGOTTEN_SECONDS - HEARTBEAT_SECONDS


class Fleet:
    """The workers that are there, by the latest report of each.

    Nothing of it is stored: workers report again and again, and `HEARTBEAT_SECONDS` after it
    began to listen a collector has heard from all of them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # reports come on a link's thread
        self._began = self._listened = self._deaf = -inf
        # By worker, its report and when it came; who is silent for longest comes first.
        self._living: OrderedDict[str, tuple[WorkerHeartbeat, float]] = OrderedDict()
        self._on: Counter[str] = Counter()

    def heard_all(self) -> bool:
        """Whether every worker that is there has had the time to say so."""
        with self._lock:
            now = self._now()
            self._forget_silent(now)
            return now - self._began >= HEARTBEAT_SECONDS

    def note(self, report: WorkerHeartbeat) -> None:
        """The worker's latest word: what it said before is forgotten."""
        with self._lock:
            now = self._now()
            before = self._forget(report.worker_id)
            if report.ending is not None and (before is None or before.ending is None):
                PREEMPTIONS.labels(report.ending).inc()
            if report.state == "stopped":
                return
            if len(self._living) >= MAX_WORKERS:
                self._forget(next(iter(self._living)))
            self._living[report.worker_id] = report, now
            if (context_id := _serves(report)) is not None:
                self._on[context_id] += 1

    def note_deaf(self) -> None:
        """Nothing can be heard now, so nobody's silence means anything."""
        with self._lock:
            self._deaf = self._clock()

    def workers_on(self, context_id: str) -> int:
        """How many workers serve the context now."""
        with self._lock:
            self._forget_silent(self._now())
            return self._on[context_id]

    def claims_held(self) -> Counter[str]:
        """How many claims its workers have in hand, by context."""
        held: Counter[str] = Counter()
        for report in self.workers():
            if report.context_id is not None:
                held[report.context_id] += report.claims_in_hand
        return held

    def workers(self) -> list[WorkerHeartbeat]:
        """The latest word of each worker that is there, the latest last."""
        with self._lock:
            self._forget_silent(self._clock())
            return [report for report, _ in self._living.values()]

    def _now(self) -> float:
        """Whoever did not listen, waiting for a store or a broker, begins anew: a silence of that
        time is nobody's.
        """
        now = self._clock()
        if now - self._listened > _PAUSE_SECONDS:
            self._began = now
        self._listened = now
        return now

    def _forget_silent(self, now: float) -> None:
        latest_gone = now - FORGOTTEN_SECONDS
        if self._deaf > latest_gone:
            return
        while self._living:
            worker_id, (report, heard) = next(iter(self._living.items()))
            if heard > latest_gone:
                return
            self._forget(worker_id)
            # Who said that it goes was counted then; while we did not listen, anybody is silent.
            if report.ending is None and self._began <= heard:
                PREEMPTIONS.labels("vanished").inc()

    def _forget(self, worker_id: str) -> WorkerHeartbeat | None:
        report, _ = self._living.pop(worker_id, (None, 0.0))
        if report is not None and (context_id := _serves(report)) is not None:
            self._on[context_id] -= 1
            if not self._on[context_id]:
                del self._on[context_id]
        return report


def _serves(report: WorkerHeartbeat) -> str | None:
    return report.context_id if report.state == "serving" else None
