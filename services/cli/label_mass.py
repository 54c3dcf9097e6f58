"""What a person is told where the label words hold nearly nothing of the probability."""

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
        help="Verify all claims even when the model hardly ever says a label word.",
    ),
]
_WAYS_OUT = (
    "Such verdicts mean little. Change the prompt's label words or the end of its template; for a "
    "model that thinks first, set its chat template's variable (chat_template_kwargs: "
    "{enable_thinking: false}) or chat: false; docs/prompts.md says more"
)


def say_low_mass(console: Screen, runs: "Sequence[RunStatus]") -> None:
    """A line for each run that it is true of."""
    for run in runs:
        if run.low_mass is not None:
            say(console, f"{run.run_id}: {run.low_mass}. {_WAYS_OUT}.")


class MassWatch:
    """Warns once when the label words hold nearly nothing of the probability, and says when to
    stop for that.
    """

    def __init__(self, console: Screen, *, allowed: bool) -> None:
        """`allowed`: warn, and go on."""
        self._console = console
        self._allowed = allowed
        self._warned = False
        self._ended: RunStatus | None = None

    def ends(self, status: "RunStatus | None") -> bool:
        """Whether the run should end: enough claims are answered to be sure, or all of them."""
        from services.store import ENOUGH_VERDICTS

        if status is None or status.low_mass is None:
            return False
        if not self._warned:
            self._warned = True
            say(self._console, f"Warning: {status.low_mass}.")
        if self._allowed or not (status.complete or status.low_mass.claims >= ENOUGH_VERDICTS):
            return False
        self._ended = status
        return True

    def raise_if_low(self) -> None:
        """Raises LabelsUnlikely when the run ended for it."""
        if self._ended is None:
            return
        way_on = (
            "To keep these results without this error"
            if self._ended.complete
            else ("The run was stopped. To verify all claims all the same")
        )
        raise LabelsUnlikely(
            f"{self._ended.low_mass}. {_WAYS_OUT}. {way_on}, rerun the command with "
            "--allow-low-mass"
        )
