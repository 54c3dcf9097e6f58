"""How long a context took to be ready, phase by phase, as a worker tells it."""

from typing import Annotated

from pydantic import Field

from services.contracts.bounds import Name, OwnId
from services.contracts.values import Value
from services.contracts.wire import Message

MAX_STARTUP_SECONDS = 30 * 24 * 3600.0

StartupSeconds = Annotated[float, Field(ge=0, le=MAX_STARTUP_SECONDS)]


class StartupPhases(Value):
    """Seconds of each phase of a start; None where it was not measured.

    `imports` is the engine's Python, as much of it as fell into this start: it may have been done,
    or begun, before. `fetch` brings the weights to the node, `load` into memory, `compile` compiles
    kernels, captures graphs and warms up, `first_token` is the first answer.
    `total` is the whole of it; phases may overlap, and there may be time between them.
    """

    imports: StartupSeconds | None = None
    fetch: StartupSeconds | None = None
    load: StartupSeconds | None = None
    compile: StartupSeconds | None = None
    first_token: StartupSeconds | None = None
    total: StartupSeconds | None = None


class ContextReady(Message):
    """A worker has its context: `seconds` from asking for it to having it.

    `warm`: the engine was there already. `startup_id` is drawn for each start, so that a message
    that comes twice counts once. `phases` are of a start that was for this worker; without any,
    and not warm, it joined one that was for another, or waited until an engine awoke.
    """

    startup_id: OwnId
    worker_id: OwnId
    context_id: OwnId
    device: Name
    warm: bool
    seconds: StartupSeconds
    phases: StartupPhases = StartupPhases()
