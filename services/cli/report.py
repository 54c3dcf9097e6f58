"""`keepwarm report`."""

from typing import Annotated

import typer
from rich.console import Console

from services.cli.label_mass import say_low_mass
from services.cli.options import StoreOption
from services.cli.screen import print_report
from services.collector import Store, build_report, find_run
from services.contracts import load_settings

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or its beginning.")]


def report(
    run: RunArgument,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report a run: accuracy with its 95 % interval, macro-F1, confusion matrix, speed, workers."""
    with Store.open(load_settings(store_url=store), create=False) as database:
        result = build_report(database, find_run(database, run))
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        print_report(Console(), result)
        say_low_mass(Console(), [result.status])
