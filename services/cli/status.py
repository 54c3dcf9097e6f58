"""`keepwarm status`."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.cli.broker_view import broker_tables, open_broker_view
from services.cli.label_mass import print_low_mass
from services.cli.logs import configure_logs
from services.cli.options import BrokerOption, StoreOption
from services.cli.screen import Screen, say, show, status_table
from services.cli.stores import readable_stores
from services.contracts import Settings, load_settings
from services.store import RunStatus, Store, missing_records, run_statuses

_MAX_WATCHED = 50
_SHOWN_RANGES = 10


def status(
    store: StoreOption = None,
    broker: BrokerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        bool, typer.Option(help="Refresh until Ctrl-C, with workers, contexts and queues.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 2.0,
) -> None:
    """List all runs: claims done, claims/s, and the time left.

    Without --store it lists the runs of the default store and of the stores in results/. With
    --watch it shows the latest 50 runs of each store, and workers, contexts and queues.
    """
    settings = load_settings(store_url=store, broker_url=broker)

    def show_json() -> None:
        print(json.dumps([run.model_dump() for run in _statuses(settings)]), flush=True)

    if as_json:
        show_json()
        while watch:
            time.sleep(every)
            show_json()
    elif watch:
        _watch(settings, every)
    else:
        runs, problems = [], []
        for store_found in readable_stores(settings):
            found = run_statuses(store_found)
            runs += found
            problems += [problem for run in found for problem in _problems(store_found, run)]
        show(Screen(), status_table(runs))
        print_low_mass(Screen(), runs)
        for problem in problems:
            say(Screen(), problem)


def _statuses(settings: Settings) -> list[RunStatus]:
    return [run for store in readable_stores(settings) for run in run_statuses(store)]


def _problems(store: Store, run: RunStatus) -> Iterator[str]:
    """Why a run will not become complete, and what to do."""
    if run.cancelled:
        return
    if run.proven is False:
        yield (
            f"{run.run_id}: some outcomes belong to claims that are not in the file. Submit the "
            "file again with this store to remove them and to send the missing claims"
        )
    if run.nowhere_since is None:
        return
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.nowhere_since))
    if run.total is None:
        yield (
            f"{run.run_id}: its submission is not complete, and since {since} none of its "
            "claims is in a queue or at a worker. Submit the file again with this store to send "
            "the missing claims"
        )
        return
    missing = run.total - run.done - run.dead
    yield (
        f"{run.run_id}: since {since} {missing:,} claims are in no queue and at no worker"
        f"{_which(store, run.run_id)}. Check `keepwarm dead list --broker URL`, or submit the file "
        "again with this store to send only these"
    )


def _which(store: Store, run_id: str) -> str:
    ranges = missing_records(store, run_id, _SHOWN_RANGES + 1)
    if not ranges:
        return ""
    shown = [
        f"{first:,}" if first == last else f"{first:,} to {last:,}"
        for first, last in ranges[:_SHOWN_RANGES]
    ]
    more = ", …" if len(ranges) > _SHOWN_RANGES else ""
    return f" (records {', '.join(shown)}{more} of the file)"


def latest_runs(settings: Settings) -> Group:
    """The latest runs of each store."""
    stores = [run_statuses(store, _MAX_WATCHED + 1) for store in readable_stores(settings)]
    parts: list[Table | Text] = [
        status_table([run for runs in stores for run in runs[:_MAX_WATCHED]])
    ]
    if any(len(runs) > _MAX_WATCHED for runs in stores):
        parts.append(
            Text(f"older runs are not shown; `keepwarm status` lists more than {_MAX_WATCHED}")
        )
    return Group(*parts)


def _watch(settings: Settings, every: float) -> None:
    console = Screen()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        # Events would be written into the table, which has the important ones.
        configure_logs(settings, nowhere)
        with open_broker_view(settings) as broker:

            def view() -> Group:
                return Group(latest_runs(settings), broker_tables(broker()))

            if not console.is_terminal:
                while True:
                    show(console, view())
                    time.sleep(every)
            with Live(view(), console=console) as live:
                while True:
                    time.sleep(every)
                    live.update(view())
