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

from services.cli.fleet_screen import heard_tables
from services.cli.found_stores import readable_stores
from services.cli.label_mass import say_low_mass
from services.cli.listening import Heard, broker_heard
from services.cli.logs import configure_logs
from services.cli.options import BrokerOption, StoreOption
from services.cli.screen import Screen, say, show, status_table
from services.contracts import Settings, load_settings
from services.store import RunStatus, Store, missing_records, run_statuses
from services.store.progress import latest_statuses

_MOST_WATCHED = 50
_SHOWN_RANGES = 10


def status(
    store: StoreOption = None,
    broker: BrokerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        bool, typer.Option(help="Go on showing it, with workers and queues, until Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
) -> None:
    """List every run: how many claims are done, how fast, how much time is left.

    Where no store is named it lists the runs of the default store and those in results/. With
    --watch it shows the latest 50 runs of each store, and workers, contexts and queues, as the
    broker's messages tell of them.
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
            problems += [told for run in found for told in _problems(store_found, run)]
        show(Screen(), status_table(runs))
        say_low_mass(Screen(), runs)
        for problem in problems:
            say(Screen(), problem)


def _statuses(settings: Settings) -> list[RunStatus]:
    return [run for store in readable_stores(settings) for run in run_statuses(store)]


def _problems(store: Store, run: RunStatus) -> Iterator[str]:
    """Why a run will not be complete by itself, and what to do."""
    if run.cancelled:
        return
    if run.proven is False:
        yield (
            f"{run.run_id}: as many outcomes as claims, but not of the same claims. Submit the "
            "file again with this store: that removes outcomes of claims that the file does not "
            "have, and sends the missing ones"
        )
    if run.nowhere_since is None:
        return
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.nowhere_since))
    if run.total is None:
        yield (
            f"{run.run_id}: its producer never said that it has sent everything, and since {since} "
            "none of its claims is in a queue or with a worker. Submit the file again with this "
            "store: that sends the missing ones"
        )
        return
    missing = run.total - run.done - run.dead
    yield (
        f"{run.run_id}: since {since} {missing:,} claims are in no queue and with no worker"
        f"{_which(store, run.run_id)}. Look for them with `keepwarm dead list --broker URL`, or "
        "submit the file again with this store: that sends just these"
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


def watched(settings: Settings) -> Group:
    """The latest runs of each store: to count a thousand of them every two seconds takes longer."""
    stores = [latest_statuses(store, _MOST_WATCHED + 1, {}) for store in readable_stores(settings)]
    parts: list[Table | Text] = [
        status_table([run for runs in stores for run in runs[:_MOST_WATCHED]])
    ]
    if any(len(runs) > _MOST_WATCHED for runs in stores):
        parts.append(
            Text(f"older runs are not shown; `keepwarm status` lists more than {_MOST_WATCHED}")
        )
    return Group(*parts)


def _watch(settings: Settings, every: float) -> None:
    console = Screen()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        # Events would be written across the table; what matters of them is in it.
        configure_logs(settings, nowhere)
        with broker_heard(settings) as broker:

            def view() -> Group:
                heard = broker if isinstance(broker, Heard) else broker.look()
                return Group(watched(settings), heard_tables(heard))

            if not console.is_terminal:
                while True:
                    show(console, view())
                    time.sleep(every)
            with Live(view(), console=console) as live:
                while True:
                    time.sleep(every)
                    live.update(view())
