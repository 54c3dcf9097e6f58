"""`keepwarm sweep`: verifies a file of claims with several prompts and models, on this machine."""

import json
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from services.cli.cells import Cell, prepared_cells
from services.cli.claims_options import BatchSizeOption
from services.cli.label_mass import AllowLowMassOption, MassWatch
from services.cli.leaderboard import LeaderboardRow, leaderboard, print_leaderboard
from services.cli.live_view import RunView
from services.cli.options import BrokerOption, StoreOption
from services.cli.prepare_submission import (
    finished_in,
    inspect_claims,
    refuse_changed_file,
    remove_foreign,
    update_gold,
)
from services.cli.process import expect_many_small_objects
from services.cli.run import WorkersOption, opened_results, write_files, write_text
from services.cli.screen import Screen, say
from services.cli.stores import RESULTS, STORE_FILE
from services.cli.sweep_file import SweepFile, keys_for_flags
from services.cli.sweep_plan import plan_sweep, print_plan
from services.contracts import Settings, load_settings
from services.contracts.errors import KeepwarmError, LabelsUnlikely
from services.contracts.values import Value
from services.local.local_run import LocalRun
from services.producer.selected_claims import selected_claims
from services.store import Store


class SweepResult(Value):
    """`sweep.json`: the sweep file as it was read, and its cells, the best one first."""

    file: str
    sweep: SweepFile
    selected: int | None
    """Claims of the part that decided the order; None without `select`."""
    cells: tuple[LeaderboardRow, ...]


def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A sweep file like samples/sweep.yaml.")
    ],
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only show what would be done: cells, what is known already, prompts as the model "
            "sees them, label tokens, memory, hours. Needs no broker and no engine.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where results go; `out` of FILE or results/FILE otherwise.", show_default=False
        ),
    ] = None,
    broker: BrokerOption = None,
    store: StoreOption = None,
    allow_low_mass: AllowLowMassOption = False,
) -> None:
    """Verify a file of claims with several prompts and models on this machine.

    FILE names the claims, the prompts and the models. Each prompt with each model is a cell: a run,
    as `keepwarm run` does it. Cells with one model share its engine. Results are OUT/sweep.json
    with the accuracy of all cells, and a directory for each cell with its verdicts and its report.
    Outcomes that are in the store are not computed again: rerun the same command to resume an
    interrupted sweep. When cells fail the others go on, and the exit code is the lowest of theirs.
    """
    expect_many_small_objects()
    settings = load_settings(broker_url=broker, store_url=store, batch_size=batch_size)
    console = Screen(stderr=True)
    sweep_file = SweepFile.read(file)
    output_dir = out or sweep_file.out or RESULTS / file.stem
    with prepared_cells(console, settings, file, sweep_file) as cells:
        selection = _selection(file, sweep_file, cells)
        if plan:
            _plan(console, file, cells, settings, output_dir, selection, as_json=as_json)
            return
        code = _verify(
            console,
            cells,
            settings,
            SweepResult(
                file=str(file),
                sweep=sweep_file,
                selected=None if selection is None else len(selection),
                cells=(),
            ),
            selection,
            output_dir=output_dir,
            workers=workers,
            allow_low_mass=allow_low_mass,
            as_json=as_json,
        )
    if code:
        sys.exit(code)


def _selection(path: Path, sweep_file: SweepFile, cells: Sequence[Cell]) -> Collection[str] | None:
    """The ids of the claims that decide the order of the cells; None if all do."""
    if sweep_file.select is None:
        return None
    # Which records are claims does not depend on the prompt, but their gold labels do.
    with keys_for_flags(path, "select"):
        return selected_claims(cells[0].submission.file, sweep_file.select, sweep_file.select_seed)


def _plan(
    console: Screen,
    path: Path,
    cells: Sequence[Cell],
    settings: Settings,
    output_dir: Path,
    selection: Collection[str] | None,
    *,
    as_json: bool,
) -> None:
    own_store = output_dir / STORE_FILE
    has_store = settings.store_url is not None or own_store.exists()
    if settings.store_url is None:
        settings = settings.model_copy(update={"store_url": str(own_store)})
    with keys_for_flags(path, "claims"):
        found = plan_sweep(
            console,
            cells,
            settings,
            has_store=has_store,
            selected=None if selection is None else len(selection),
        )
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        print_plan(Screen(), found)


def _verify(
    console: Screen,
    cells: Sequence[Cell],
    settings: Settings,
    result: SweepResult,
    selection: Collection[str] | None,
    *,
    output_dir: Path,
    workers: int,
    allow_low_mass: bool,
    as_json: bool,
) -> int:
    """Compute what is missing, write and print the results, and return the exit code."""
    with opened_results(output_dir, settings, console) as (settings, data_dir, database):
        claims = _prepare(console, Path(result.file), cells, database, output_dir)
        masses = {
            cell.run_id: MassWatch(console, allowed=allow_low_mass, name=cell.name)
            for cell in cells
        }
        local_run = LocalRun(
            [cell.submission for cell in cells],
            settings,
            database,
            RunView(console, claims, masses, {cell.run_id: cell.name for cell in cells}),
            partial(finished_in, database),
            output_dir=output_dir,
            data_dir=data_dir,
            workers=workers,
        )
        stopped_by = local_run.run()
        errors: dict[str, KeepwarmError] = {**local_run.failures}
        for run_id, mass in masses.items():
            try:
                mass.raise_if_low()
            except LabelsUnlikely as error:
                errors.setdefault(run_id, error)
        for cell in cells:
            write_files(database, cell.run_id, output_dir / cell.directory)
        messages = {run_id: str(error) for run_id, error in errors.items()}
        rows = leaderboard(database, cells, messages, selection)
    result = result.model_copy(update={"cells": rows})
    write_text(output_dir / "sweep.json", result.model_dump_json(indent=2) + "\n")
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        print_leaderboard(Screen(), rows)
    for row in rows:
        if row.error is not None:
            say(console, f"keepwarm: {row.name}: {row.error}")
    say(console, f"Results are in {output_dir}/")
    if stopped_by is not None:
        say(console, "Stopped. Rerun the same command to resume the sweep.")
        return 128 + stopped_by
    return min((error.exit_code for error in errors.values()), default=0)


def _prepare(
    console: Screen, path: Path, cells: Sequence[Cell], database: Store, output_dir: Path
) -> int:
    """Compare the cells with their runs in the store, and return the number of all claims."""
    claims = 0
    shown: set[str] = set()

    def show(cell: Cell, line: str) -> None:
        """What the file holds, once; then where that is different for a prompt."""
        if line not in shown:
            say(console, f"{cell.prompt}: {line}" if cell.prompt != cells[0].prompt else line)
            shown.add(line)

    for cell in cells:
        with keys_for_flags(path, "claims"):
            refuse_changed_file(cell.submission, database)
            rejected = output_dir / cell.directory / "rejected.jsonl"
            summary = inspect_claims(console, cell.submission, rejected, partial(show, cell))
        remove_foreign(cell.submission, database, console)
        update_gold(cell.submission, database)
        claims += summary.claims
    return claims
