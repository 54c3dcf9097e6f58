"""How long a context took to become ready, by phase, as a worker reports it."""

from typing import Annotated

from pydantic import Field

from services.contracts.bounds import GeneratedId, Name
from services.contracts.values import Value
from services.contracts.wire import Message

MAX_STARTUP_SECONDS = 30 * 24 * 3600.0

StartupSeconds = Annotated[float, Field(ge=0, le=MAX_STARTUP_SECONDS)]


class StartupPhases(Value):
    """Seconds of each phase of a start; None if it was not measured.

    `imports` is the import of the engine's Python modules, as far as it was part of this start: the
    fork server may have done it before. `fetch` brings the weights to the node, `load` into memory.
    `compile` compiles kernels, captures graphs and warms up. `first_token` is the first answer.
    `total` is the whole start; phases may overlap, and there may be time between them.
    """

    imports: StartupSeconds | None = None
    fetch: StartupSeconds | None = None
    load: StartupSeconds | None = None
    compile: StartupSeconds | None = None
    first_token: StartupSeconds | None = None
    total: StartupSeconds | None = None


class ContextReady(Message):
    """A worker's context is ready, `seconds` after the worker requested it.

    `warm`: the engine was warm already. `startup_id` is random for each start, so that a message
    that is delivered twice counts once. `phases` describes a start for this worker. If it is empty
    and `warm` is false, the worker joined another worker's start, or waited for an engine to wake.
    """

    startup_id: GeneratedId
    worker_id: GeneratedId
    context_id: GeneratedId
    device: Name
    warm: bool
    seconds: StartupSeconds
    phases: StartupPhases = StartupPhases()
