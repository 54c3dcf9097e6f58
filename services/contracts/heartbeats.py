"""Heartbeats: each worker reports at intervals that it is alive, and what it serves."""

import os
import re
import secrets
import socket
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from services.contracts.addresses import ReachableAddress
from services.contracts.bounds import GeneratedId, Int31, Int63, Name
from services.contracts.wire import Message

HEARTBEAT_SECONDS = 5.0
"""The interval between a worker's heartbeats; a change is reported at once."""
HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""A worker without a heartbeat for this long is gone: three may be lost or late."""


def unique_process_name() -> str:
    """A name for this process that is unique across machines."""
    # A host name may contain characters that names on the broker may not.
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).lstrip("-.") or "host"
    return f"{host[:200]}-{os.getpid()}-{secrets.token_hex(2)}"


WorkerState = Literal["idle", "starting", "serving", "draining", "stopped"]

Ending = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "walltime", "failure"]
"""Why a worker ends: a signal, its walltime, or an error that it cannot recover from."""

RestartReason = Literal["engine-ended", "out-of-memory"]
"""Why a worker's engine starts again."""

JOB_ID = r"^[A-Za-z0-9._+-]{1,64}$"
JobId = Annotated[str, StringConstraints(pattern=JOB_ID)]


class WorkerHeartbeat(Message):
    """A worker's current state; it replaces the worker's previous heartbeat.

    `context_id` is the context that it serves, or loads while `starting`; None while `idle`.
    `claims_per_second` is measured on that context; None before the first measurement. A worker
    that reports `stopped` is gone at once. Older workers do not send the fields with a default.
    """

    wire_type: ClassVar[str] = "WorkerReport"
    transient: ClassVar[bool] = True

    worker_id: GeneratedId
    context_id: GeneratedId | None
    device: Name
    state: WorkerState
    claims_per_second: Annotated[float, Field(ge=0)] | None
    host: Name | None = None
    job_id: JobId | None = None
    """Its job id in the cluster's scheduler."""
    walltime_left_seconds: Annotated[float, Field(ge=0)] | None = None
    """Seconds until its walltime is over; None if that is not known."""
    batches_in_hand: Int31 = 0
    claims_in_hand: Int31 = 0
    """Claims in flight: taken, and without an outcome."""
    metrics_address: ReachableAddress | None = None
    """Where it serves its metrics."""
    ending: Ending | None = None
    """Why it ends, once it does."""
    restart_reason: Annotated[
        RestartReason | None, Field(exclude_if=lambda reason: reason is None)
    ] = None
    """Why its engine starts again, while `starting`; None at the first start."""
    claims_answered: Annotated[Int63, Field(exclude_if=lambda claims: not claims)] = 0
    """Claims that its engine has answered so far; only workers of `keepwarm run` count them. A
    claim that was asked twice counts twice.
    """
