"""A worker's heartbeats to the collectors, and the control updates that it receives from them."""

import socket
import threading
import time
from dataclasses import dataclass
from typing import Self

import structlog

from services.broker import Outgoing, Publisher
from services.contracts import (
    ContextDemand,
    ControlUpdate,
    Settings,
    WorkerHeartbeat,
    decode,
    topology,
)
from services.contracts.errors import MessageInvalid, MessageTooNew
from services.contracts.heartbeats import HEARTBEAT_SECONDS, Ending, RestartReason, WorkerState
from services.gpu_worker.in_flight import WorkerIdentity
from services.node.batch_job import job_id
from services.node.walltime import seconds_left

_PROGRESS_SECONDS = 0.2

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """Where a worker runs and until when."""

    host: str
    job_id: str | None = None
    metrics_address: str | None = None
    ends_at: float | None = None
    """When its walltime is over, on the monotonic clock."""

    @classmethod
    def detect(cls, settings: Settings, metrics_address: str | None) -> Self:
        """Raises UsageError when the scheduler's end time of the job cannot be read."""
        left = seconds_left(settings)
        return cls(
            host=socket.gethostname(),
            job_id=job_id(),
            metrics_address=metrics_address,
            ends_at=None if left is None else time.monotonic() + left,
        )

    @property
    def seconds_left(self) -> float | None:
        return None if self.ends_at is None else max(0.0, self.ends_at - time.monotonic())


class HeartbeatSender:
    """Sends a heartbeat every `HEARTBEAT_SECONDS` and at each change. Never waits for the broker.
    Any thread may call it.
    """

    def __init__(
        self, identity: WorkerIdentity, placement: WorkerPlacement, *, watched: bool = False
    ) -> None:
        """With `watched`, heartbeats have the number of answered claims, and one is sent every
        `_PROGRESS_SECONDS` while it grows.
        """
        self._identity = identity
        self._placement = placement
        self._watched = watched
        self._lock = threading.Lock()
        self._last_sent: WorkerHeartbeat | None = None
        self._last_sent_at = 0.0
        self._answered = 0
        self.ending: Ending | None = None
        """Why the worker ends, once it does."""

    def count_answer(self) -> None:
        """Count an answer of the engine, before its batch is complete and published."""
        if self._watched:
            with self._lock:
                self._answered += 1

    def send_if_due(
        self,
        state: WorkerState,
        publisher: Publisher,
        *,
        context_id: str | None = None,
        restart_reason: RestartReason | None = None,
        claims_per_second: float | None = None,
        batches_in_flight: int = 0,
        claims_in_flight: int = 0,
    ) -> None:
        """Send a heartbeat if the last one is old, or had another state, context or reason. Nothing
        is sent after `stopped`.

        A heartbeat that the broker does not accept now is not queued: the next call makes a new
        one.
        """
        with self._lock:
            now, last = time.monotonic(), self._last_sent
            if last is not None:
                progress = self._answered > last.claims_answered
                due = self._last_sent_at + (_PROGRESS_SECONDS if progress else HEARTBEAT_SECONDS)
                known = (last.state, last.context_id, last.restart_reason)
                unchanged = known == (state, context_id, restart_reason)
                if last.state == "stopped" or (unchanged and now < due):
                    return
            heartbeat = WorkerHeartbeat(
                worker_id=self._identity.worker_id,
                device=self._identity.device,
                state=state,
                context_id=context_id,
                claims_per_second=claims_per_second,
                batches_in_hand=batches_in_flight,
                claims_in_hand=claims_in_flight,
                host=self._placement.host,
                job_id=self._placement.job_id,
                metrics_address=self._placement.metrics_address,
                walltime_left_seconds=self._placement.seconds_left,
                ending=self.ending,
                restart_reason=restart_reason,
                claims_answered=self._answered,
            )
            message = Outgoing.of(heartbeat, topology.HEARTBEATS_EXCHANGE, "")
            if publisher.offer(message):
                self._last_sent, self._last_sent_at = heartbeat, now


class ControlState:
    """The latest control update. A link's thread writes it; any thread may read it."""

    def __init__(self) -> None:
        self._update = ControlUpdate()
        self.update_count = 0
        """How many updates were received, so that a reader can tell whether there is a new one."""

    @property
    def cancelled(self) -> tuple[str, ...]:
        """Ids of cancelled submissions."""
        return self._update.cancelled

    @property
    def demand(self) -> tuple[ContextDemand, ...]:
        """The contexts with claims waiting or workers serving, those with most demand first."""
        return self._update.contexts

    def receive(self, body: bytes) -> None:
        """Replace the state with this update. A body that cannot be decoded changes nothing."""
        try:
            self._update = decode(ControlUpdate, body)
            self.update_count += 1
        except (MessageInvalid, MessageTooNew) as error:
            log.warning("control_update.refused", reason=str(error))
