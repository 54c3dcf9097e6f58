"""The fleet: the live workers and how many serve each context, by their heartbeats."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from math import inf

from services.collector.metrics import PREEMPTIONS
from services.contracts import WorkerHeartbeat
from services.contracts.heartbeats import HEARTBEAT_SECONDS, HEARTBEAT_TIMEOUT_SECONDS

MAX_WORKERS = 100_000
"""Beyond this number, the workers with the oldest heartbeats are forgotten."""
_PAUSE_SECONDS = HEARTBEAT_TIMEOUT_SECONDS - HEARTBEAT_SECONDS


class Fleet:
    """The live workers, by their latest heartbeats.

    Nothing is stored: within `HEARTBEAT_SECONDS` after it began to listen, a collector has a
    heartbeat of every worker.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # heartbeats come on a link's thread
        self._listening_since = self._last_call = self._disconnected_at = -inf
        # By worker: its latest heartbeat and when it came, the oldest first.
        self._workers: OrderedDict[str, tuple[WorkerHeartbeat, float]] = OrderedDict()
        self._serving: Counter[str] = Counter()

    def heard_from_all(self) -> bool:
        """Whether every live worker has had time to send a heartbeat."""
        with self._lock:
            now = self._now()
            self._forget_silent(now)
            return now - self._listening_since >= HEARTBEAT_SECONDS

    def note(self, heartbeat: WorkerHeartbeat) -> None:
        """Replace the worker's previous heartbeat with this one."""
        with self._lock:
            now = self._now()
            previous = self._forget(heartbeat.worker_id)
            if heartbeat.ending is not None and (previous is None or previous.ending is None):
                PREEMPTIONS.labels(heartbeat.ending).inc()
            if heartbeat.state == "stopped":
                return
            if len(self._workers) >= MAX_WORKERS:
                self._forget(next(iter(self._workers)))
            self._workers[heartbeat.worker_id] = heartbeat, now
            if (context_id := _served_context(heartbeat)) is not None:
                self._serving[context_id] += 1

    def note_disconnected(self) -> None:
        """No heartbeats can arrive now, so a missing one does not mean that a worker is gone."""
        with self._lock:
            self._disconnected_at = self._clock()

    def workers_on(self, context_id: str) -> int:
        """The number of workers that serve the context now."""
        with self._lock:
            self._forget_silent(self._now())
            return self._serving[context_id]

    def claims_held(self) -> Counter[str]:
        """The number of claims in flight at workers, by context."""
        held: Counter[str] = Counter()
        for heartbeat in self.workers():
            if heartbeat.context_id is not None:
                held[heartbeat.context_id] += heartbeat.claims_in_hand
        return held

    def worker(self, worker_id: str) -> WorkerHeartbeat | None:
        """The latest heartbeat of this worker, if it is live."""
        with self._lock:
            heartbeat, _ = self._workers.get(worker_id, (None, 0.0))
            return heartbeat

    def workers(self) -> list[WorkerHeartbeat]:
        """The latest heartbeat of each live worker, the newest last."""
        with self._lock:
            self._forget_silent(self._clock())
            return [heartbeat for heartbeat, _ in self._workers.values()]

    def _now(self) -> float:
        """The time now. If the collector was busy for long, with the store or the broker, listening
        starts anew: heartbeats may have been missed in that time.
        """
        now = self._clock()
        if now - self._last_call > _PAUSE_SECONDS:
            self._listening_since = now
        self._last_call = now
        return now

    def _forget_silent(self, now: float) -> None:
        oldest_valid = now - HEARTBEAT_TIMEOUT_SECONDS
        if self._disconnected_at > oldest_valid:
            return
        while self._workers:
            worker_id, (heartbeat, received_at) = next(iter(self._workers.items()))
            if received_at > oldest_valid:
                return
            self._forget(worker_id)
            # A worker that announced its end was counted then. Silence before `_listening_since`
            # does not count: its heartbeats may have been missed.
            if heartbeat.ending is None and self._listening_since <= received_at:
                PREEMPTIONS.labels("vanished").inc()

    def _forget(self, worker_id: str) -> WorkerHeartbeat | None:
        heartbeat, _ = self._workers.pop(worker_id, (None, 0.0))
        if heartbeat is not None and (context_id := _served_context(heartbeat)) is not None:
            self._serving[context_id] -= 1
            if not self._serving[context_id]:
                del self._serving[context_id]
        return heartbeat


def _served_context(heartbeat: WorkerHeartbeat) -> str | None:
    return heartbeat.context_id if heartbeat.state == "serving" else None
