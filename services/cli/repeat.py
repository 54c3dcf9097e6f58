"""`--only invalid,dead --from RUN`: claims without a useful verdict in an earlier run."""

from typing import Annotated

import typer

from services.cli.found_stores import store_of_run
from services.contracts import Settings
from services.contracts.errors import InputError, UsageError
from services.store import unanswered_claims

_KINDS = ("invalid", "dead")

OnlyOption = Annotated[
    str | None,
    typer.Option(
        "--only",
        help="With --from: only claims of that run whose verdict is INVALID (invalid), that are "
        "dead (dead), or both (invalid,dead). Use another prompt or model for them.",
        show_default=False,
    ),
]
FromOption = Annotated[
    str | None,
    typer.Option("--from", help="The run that --only refers to.", show_default=False),
]


def claims_to_repeat(
    settings: Settings, only: str | None, from_run: str | None
) -> frozenset[str] | None:
    """The ids of the selected claims; None for all claims.

    Raises UsageError for an invalid combination of flags, StoreError when there is no such run,
    InputError when no claim matches.
    """
    if only is None and from_run is None:
        return None
    kinds = [kind.strip() for kind in (only or "").split(",")]
    if from_run is None or not set(kinds) <= set(_KINDS):
        raise UsageError("--only and --from go together: --only invalid,dead --from RUN")
    with store_of_run(settings, from_run) as (store, known):
        found = unanswered_claims(store, known, kinds)
    if not found:
        raise InputError(
            f"{known.run_id} has no {' or '.join(kinds)} claims, so there is nothing to repeat"
        )
    return found
