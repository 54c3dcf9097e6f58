"""`keepwarm status`."""

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from services.cli.options import StoreOption
from services.cli.screen import status_table
from services.collector import Store, run_statuses
from services.contracts import load_settings


def status(
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option(help="Go on showing it, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
) -> None:
    """Tell of every run: how many claims, how many done, how fast, how long still."""
    database = Store.open(load_settings(store_url=store), create=False)

    def show_json() -> None:
        print(json.dumps([run.model_dump() for run in run_statuses(database)]), flush=True)

    if as_json:
        show_json()
        while watch:
            time.sleep(every)
            show_json()
        return
    console = Console()
    if not watch:
        console.print(status_table(run_statuses(database)))
        return
    with Live(status_table(run_statuses(database)), console=console) as live:
        while True:
            time.sleep(every)
            live.update(status_table(run_statuses(database)))
