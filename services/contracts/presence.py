"""That a worker is there, and what it serves, as it says itself again and again."""

import os
import secrets
import socket
from typing import Annotated, Literal

from pydantic import Field

from services.contracts.bounds import Identity, Name
from services.contracts.wire import Message

REPORT_SECONDS = 5.0
"""From one report of a worker to its next; a change is reported at once."""
FORGOTTEN_SECONDS = 20.0
"""A worker that was silent for so long is gone: three of its reports may be lost or late."""


def own_name() -> str:
    """A name for this process that no other has, here or elsewhere."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


WorkerState = Literal["starting", "serving", "draining", "stopped"]


class WorkerReport(Message):
    """A worker's latest word; it replaces what that worker said before.

    `context_id` is the context that it serves, None while it has none or loads one.
    `claims_per_second` is as measured on that context, None before. One that says `stopped` is
    gone at once.
    """

    worker_id: Name
    context_id: Identity | None
    device: Name
    state: WorkerState
    claims_per_second: Annotated[float, Field(ge=0)] | None
