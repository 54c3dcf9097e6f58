"""`keepwarm export`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli.found_stores import store_of_run
from services.cli.options import StoreOption
from services.cli.report import RunArgument
from services.cli.shown import shown
from services.contracts import load_settings
from services.store import ExportFormat, export_run

_SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "fever": ".fever.jsonl"}


def export(
    run: RunArgument,
    format: Annotated[ExportFormat, typer.Option(help="fever: as the FEVER scorer takes it.")],
    store: StoreOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file; RUN with a suffix otherwise.", show_default=False
        ),
    ] = None,
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Write texts in CSV as they are, formulas too.")
    ] = False,
) -> None:
    """Write the outcomes of a run to a file, one row a claim, in the order of the input.

    In CSV a text that a spreadsheet would run as a formula (it begins with =, +, - or @) gets a '
    before it; --formulas writes all texts as they are.
    """
    with store_of_run(load_settings(store_url=store), run) as (database, known):
        # A store that somebody gave us may have any id; only a name in this directory is taken.
        path = out or Path(Path(known.run_id).name + _SUFFIXES[format])
        count = export_run(database, known, format, path, formulas=formulas)
    print(shown(f"{count:,} rows in {path}"), file=sys.stderr)
