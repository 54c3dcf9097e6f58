"""`keepwarm report`."""

import json
from typing import Annotated

import typer

from services.cli.found_stores import store_of_run
from services.cli.label_mass import say_low_mass
from services.cli.options import StoreOption
from services.cli.screen import Screen, print_report
from services.contracts import load_settings
from services.store import build_report

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or its beginning.")]


def report(
    run: RunArgument,
    store: StoreOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also the confusion matrix, workers and their starts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report a run: accuracy with its 95 % interval, macro-F1, counts, and what went wrong."""
    with store_of_run(load_settings(store_url=store), run) as (database, known):
        result = build_report(database, known)
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        print_report(Screen(), result, full=full)
        say_low_mass(Screen(), [result.status])
