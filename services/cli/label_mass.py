"""Warnings and the error when the label words have nearly no probability."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.screen import Screen, say
from services.contracts.errors import LabelsUnlikely

if TYPE_CHECKING:
    from services.store import RunStatus

AllowLowMassOption = Annotated[
    bool,
    typer.Option(
        "--allow-low-mass",
        help="Verify all claims even if the model hardly ever answers with a label word.",
    ),
]
_NEXT_STEP = (
    "Such verdicts mean little. Change the prompt's label words or the end of its template; for a "
    "model that thinks first, set its chat template's variable (chat_template_kwargs: "
    "{enable_thinking: false}) or chat: false; see docs/prompts.md"
)


def print_low_mass(console: Screen, runs: "Sequence[RunStatus]") -> None:
    """Print a warning for each run with low label mass."""
    for run in runs:
        if run.low_mass is not None:
            say(console, f"{run.run_id}: {run.low_mass}. {_NEXT_STEP}.")


class MassWatch:
    """Warns once when the label words have nearly no probability, and decides when to stop."""

    def __init__(self, console: Screen, *, allowed: bool, name: str = "") -> None:
        """`allowed`: warn, but do not stop. `name`: of the run, if there are several."""
        self._console = console
        self._allowed = allowed
        self._of = f"{name}: " if name else ""
        self._warned = False
        self._stopped: RunStatus | None = None

    def should_stop(self, status: "RunStatus | None") -> bool:
        """Whether the run should stop: enough claims, or all of them, are answered."""
        from services.store import ENOUGH_VERDICTS

        if status is None or status.low_mass is None:
            return False
        if not self._warned:
            self._warned = True
            say(self._console, f"Warning: {self._of}{status.low_mass}.")
        if self._allowed or not (status.complete or status.low_mass.claims >= ENOUGH_VERDICTS):
            return False
        self._stopped = status
        return True

    def raise_if_low(self) -> None:
        """Raises LabelsUnlikely when this was the reason to stop."""
        if self._stopped is None:
            return
        purpose = (
            "To accept these results"
            if self._stopped.complete
            else "The run was stopped. To verify all claims anyway"
        )
        raise LabelsUnlikely(
            f"{self._stopped.low_mass}. {_NEXT_STEP}. {purpose}, rerun the command with "
            "--allow-low-mass"
        )
