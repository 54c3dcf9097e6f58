"""What a worker says of itself: that it is there, where, what it serves, how fast."""

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
from services.contracts.heartbeats import HEARTBEAT_SECONDS, Ending, WorkerState
from services.gpu_worker.in_flight import WorkerIdentity
from services.node.batch_job import job_id
from services.node.walltime import seconds_left

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Post:
    """Where a worker stands, as those know it who put it there."""

    host: str
    job_id: str | None = None
    metrics_address: str | None = None
    ends_at: float | None = None
    """When its node is taken away, by the monotonic clock."""

    @classmethod
    def of(cls, settings: Settings, metrics_address: str | None) -> Self:
        """Raises UsageError when the scheduler's end of the job is no time."""
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


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker is at."""

    context_id: str | None = None
    claims_per_second: float | None = None
    batches_in_hand: int = 0
    claims_in_hand: int = 0


class HeartbeatSender:
    """Sends one every `HEARTBEAT_SECONDS`, and one at each change; never waits for the broker."""

    def __init__(self, signature: WorkerIdentity, post: Post) -> None:
        self._signature = signature
        self._post = post
        self._lock = threading.Lock()
        self._said: tuple[WorkerState, str | None] | None = None
        self._due = 0.0
        self.ending: Ending | None = None
        """Why the worker is going, once it is."""

    def say(self, state: WorkerState, doing: WorkerStatus, publisher: Publisher) -> None:
        """Tell the collectors that listen, if it is time. Any thread.

        While the broker takes nothing, or no more, it is not: a report is only worth something now.
        """
        with self._lock:
            now = time.monotonic()
            same = (state, doing.context_id) == self._said and now < self._due
            gone = self._said is not None and self._said[0] == "stopped"
            if same or gone:
                return
            report = self._report(state, doing)
            if publisher.offer(
                Outgoing.of(report, topology.HEARTBEATS_EXCHANGE, "", transient=True)
            ):
                self._said, self._due = (state, doing.context_id), now + HEARTBEAT_SECONDS

    def _report(self, state: WorkerState, doing: WorkerStatus) -> WorkerHeartbeat:
        return WorkerHeartbeat(
            worker_id=self._signature.worker_id,
            device=self._signature.device,
            state=state,
            context_id=doing.context_id,
            claims_per_second=doing.claims_per_second,
            batches_in_hand=doing.batches_in_hand,
            claims_in_hand=doing.claims_in_hand,
            host=self._post.host,
            job_id=self._post.job_id,
            metrics_address=self._post.metrics_address,
            walltime_left_seconds=self._post.seconds_left,
            ending=self.ending,
        )


class ControlState:
    """The latest notice. Heard on a link's thread, read on any."""

    def __init__(self) -> None:
        self._notice = ControlUpdate()
        self.number = 0
        """Of the notices that came, so that one can tell whether there was another."""

    @property
    def cancelled(self) -> tuple[str, ...]:
        """Submissions whose claims nobody wants any more."""
        return self._notice.cancelled

    @property
    def contexts(self) -> tuple[ContextDemand, ...]:
        """The directory: contexts with claims waiting, and who is there."""
        return self._notice.contexts

    def hear(self, body: bytes) -> None:
        """A notice came; it replaces what was said before. What is none is left alone."""
        try:
            self._notice = decode(ControlUpdate, body)
            self.number += 1
        except (MessageInvalid, MessageTooNew) as error:
            log.warning("notice.refused", reason=str(error))
