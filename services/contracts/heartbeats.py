"""That a worker is there, and what it serves, as it says itself again and again."""

import os
import re
import secrets
import socket
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from services.contracts.addresses import ReachableAddress
from services.contracts.bounds import Int31, Name, OwnId
from services.contracts.wire import Message

HEARTBEAT_SECONDS = 5.0
"""From one report of a worker to its next; a change is reported at once."""
HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""A worker that was silent for so long is gone: three of its reports may be lost or late."""


def unique_process_name() -> str:
    """A name for this process that no other has, here or elsewhere."""
    # Whatever the machine's administrator has named it.
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).lstrip("-.") or "host"
    return f"{host[:200]}-{os.getpid()}-{secrets.token_hex(2)}"


WorkerState = Literal["idle", "starting", "serving", "draining", "stopped"]

Ending = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "walltime", "failure"]
"""What ends a worker: a signal, its walltime, or that it cannot go on."""

JOB_ID = r"^[A-Za-z0-9._+-]{1,64}$"
JobId = Annotated[str, StringConstraints(pattern=JOB_ID)]


class WorkerHeartbeat(Message):
    """A worker's latest word; it replaces what that worker said before.

    `context_id` is the context that it serves, or loads while it is `starting`; None while it is
    `idle` and waits for one. `claims_per_second` is as measured on that context, None before. One
    that says `stopped` is gone at once. Older workers tell nothing of what has a default.
    """

    wire_type: ClassVar[str] = "WorkerReport"

    worker_id: OwnId
    context_id: OwnId | None
    device: Name
    state: WorkerState
    claims_per_second: Annotated[float, Field(ge=0)] | None
    host: Name | None = None
    job_id: JobId | None = None
    """As the cluster's scheduler calls the job that it is."""
    walltime_left_seconds: Annotated[float, Field(ge=0)] | None = None
    """Until its node is taken away; None where nobody said when."""
    batches_in_hand: Int31 = 0
    claims_in_hand: Int31 = 0
    """Claims that it has taken and not given an outcome yet."""
    metrics_address: ReachableAddress | None = None
    """Where it serves its metrics."""
    ending: Ending | None = None
    """Why it is going, once it is."""
