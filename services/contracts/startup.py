"""How long a context took to become warm, phase by phase."""

from typing import Annotated

from pydantic import Field

from services.contracts.values import Value

PhaseSeconds = Annotated[float, Field(ge=0)]


class StartupPhases(Value):
    """Seconds of each phase; None where it was not measured. `total` is from wish to warmth, and
    more than the sum: processes start, and the server puts up its routes.
    """

    imports: PhaseSeconds | None = None
    """Environment and imports; 0 where a template had them done."""
    fetch: PhaseSeconds | None = None
    """Weights to the node."""
    load: PhaseSeconds | None = None
    """Weights to memory."""
    compile: PhaseSeconds | None = None
    """Compilation, memory profiling and warm-up."""
    first_token: PhaseSeconds | None = None
    """The first answer."""
    total: PhaseSeconds
