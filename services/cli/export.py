"""`keepwarm export`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import StoreOption
from services.cli.printable import printable
from services.cli.report import RunArgument
from services.cli.stores import store_of_run
from services.contracts import load_settings
from services.store import ExportFormat, export_run

_SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "fever": ".fever.jsonl"}


def export(
    run: RunArgument,
    format: Annotated[ExportFormat, typer.Option(help="fever: for the FEVER scorer.")],
    store: StoreOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file; - for standard output. Default: RUN with a suffix.",
            show_default=False,
        ),
    ] = None,
    formulas: Annotated[
        bool,
        typer.Option("--formulas", help="Write texts in CSV unchanged, even if they are formulas."),
    ] = False,
) -> None:
    """Write the outcomes of a run to a file, one row for each claim, in input order.

    In CSV, a text that a spreadsheet would run as a formula (it begins with =, +, - or @) gets the
    prefix '; with --formulas texts are unchanged.
    """
    with store_of_run(load_settings(store_url=store), run) as (database, known):
        # A store from elsewhere may have any id; only its last part is used as a file name.
        path = out or Path(Path(known.run_id).name + _SUFFIXES[format])
        target = None if path == Path("-") else path
        count = export_run(database, known, format, target, formulas=formulas)
    print(printable(f"{count:,} rows in {target or 'standard output'}"), file=sys.stderr)
