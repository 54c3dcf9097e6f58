"""`keepwarm doctor`."""

import json
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from services.cli.options import BrokerOption, StoreOption
from services.cli.screen import Screen, show
from services.contracts import KeepwarmError, Settings, load_settings
from services.doctor import node_checks, service_checks
from services.doctor.findings import Check

# In the order in which a user would fix them.
CHECKS: Mapping[str, Check] = {
    "python": node_checks.python,
    "packages": node_checks.packages,
    "limits": node_checks.limits,
    "clock": node_checks.clock,
    "runtime directory": node_checks.runtime_dir,
    "caches": node_checks.caches,
    "device": node_checks.device,
    "engine": node_checks.engine,
    "keeper": node_checks.keeper,
    "private broker": service_checks.private_broker,
    "broker": service_checks.broker,
    "store": service_checks.store,
}
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    broker: BrokerOption = None,
    store: StoreOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line.")
    ] = False,
) -> None:
    """Check this machine and this installation, and report how to fix each problem.

    It starts no service, and creates only Keepwarm's own directories. A warning about a service
    that this machine does not run can be ignored. The exit code is 0, or that of the first error:
    2 a setting, 4 the engine, 5 the broker, 6 the store.
    """
    settings = load_settings(broker_url=broker, store_url=store)
    console = Screen(stderr=as_json)
    exit_code = 0
    for name, check in CHECKS.items():
        with console.status(f"{name} …"):
            level, message, code = _run_check(check, settings)
        exit_code = exit_code or code
        if as_json:
            print(json.dumps({"check": name, "level": level, "message": message}), flush=True)
        else:
            show(console, _row(name, level, message))
    if exit_code:
        raise typer.Exit(exit_code)


def _run_check(check: Check, settings: Settings) -> tuple[str, str, int]:
    """Level, message and exit code."""
    try:
        finding = check(settings)
    except KeepwarmError as error:
        return "error", str(error), error.exit_code
    except ModuleNotFoundError as error:
        return "warning", f"not checked: {error.name} is not installed here", 0
    return finding.level, finding.message, 0


def _row(name: str, level: str, message: str) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_column(width=max(map(len, _STYLES)))
    row.add_column(width=max(map(len, CHECKS)))
    row.add_column(overflow="fold")
    row.add_row(Text(level, style=_STYLES[level]), name, Text(message))
    return row
