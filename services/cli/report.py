"""`keepwarm report`."""

import json
from typing import Annotated

import typer

from services.cli.label_mass import print_low_mass
from services.cli.options import StoreOption
from services.cli.screen import Screen, print_report
from services.cli.stores import store_of_run
from services.contracts import load_settings
from services.store import build_report

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id, its beginning, or its directory in results/."),
]


def report(
    run: RunArgument,
    store: StoreOption = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Also print the confusion matrix, workers and their startup times."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a run's report: accuracy with its 95 % interval, macro-F1, counts, and problems."""
    with store_of_run(load_settings(store_url=store), run) as (database, known):
        result = build_report(database, known)
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        print_report(Screen(), result, full=full)
        print_low_mass(Screen(), [result.status])
