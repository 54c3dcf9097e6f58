"""The stores to read: that of --store, or else the default one and those of `keepwarm run`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.cli.printable import printable
from services.contracts import Settings
from services.contracts.errors import StoreError, UsageError
from services.node.file_systems import network_file_system
from services.store import KnownRun, Store, find_run, known_runs
from services.store.database import checked_url, redacted

RESULTS = Path("results")
"""Where `keepwarm run` writes without --out, in the working directory."""
STORE_FILE = "keepwarm.sqlite"


def found_stores(settings: Settings) -> list[Settings]:
    """Settings for each store to read: the named one; otherwise the default one if it exists, and
    those in `results/`, the latest first.

    Raises StoreError when there is no store.
    """
    if settings.store_url is not None:
        return [settings]
    default = _default_store(settings)
    in_results = sorted(
        RESULTS.glob(f"*/{STORE_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    paths = [path for path in (*default, *in_results) if path.exists()]
    if not paths:
        nowhere = f"there is no store at {default[0]}" if default else "there is no default store"
        raise StoreError(
            f"{nowhere}, and no {RESULTS}/*/{STORE_FILE} in {Path.cwd()}; "
            "name one with --store or KEEPWARM_STORE_URL (after `keepwarm run --out DIRECTORY` it "
            f"is DIRECTORY/{STORE_FILE})"
        )
    return [settings.model_copy(update={"store_url": str(path)}) for path in paths]


def _default_store(settings: Settings) -> list[Path]:
    try:
        return [Path(settings.store.removeprefix("sqlite:///"))]
    except UsageError:  # this user has no home directory
        return []


def readable_stores(settings: Settings) -> Iterator[Store]:
    """Open each store found, and close it before the next. A store that cannot be read is reported
    on standard error. Raises StoreError when it is the only one.
    """
    found = found_stores(settings)
    for each in found:
        try:
            store = Store.open(each, create=False)
        except StoreError as error:
            if len(found) == 1:
                raise
            print(printable(f"keepwarm: skipped a store: {error}"), file=sys.stderr)
            continue
        with store:
            yield store


@contextmanager
def store_of_run(settings: Settings, wanted: str) -> Iterator[tuple[Store, KnownRun]]:
    """The run whose id is, or begins with, `wanted`, or which is the only one in an output
    directory of `keepwarm run`, or that of a cell's directory of `keepwarm sweep`, and its store.

    Raises StoreError when no store, or more than one, has such a run.
    """
    directory = Path(wanted)
    if os.path.isdir(directory):  # noqa: PTH112  (Path.is_dir raises for what is no path)
        own, of_sweep = directory / STORE_FILE, directory.parent / STORE_FILE
        path = own if own.is_file() else of_sweep
        if path.is_file():
            in_path = settings.model_copy(update={"store_url": str(path)})
            with Store.open(in_path, create=False) as store:
                run_id = f"run-{directory.name.rpartition('-')[2]}"  # of a sweep's cell
                yield store, _only_run(store, own) if path == own else find_run(store, run_id)
            return
    having: list[tuple[Settings, KnownRun]] = []
    refusals: list[StoreError] = []
    for each in found_stores(settings):
        try:
            with Store.open(each, create=False) as store:
                having.append((each, find_run(store, wanted)))
        except StoreError as error:
            refusals.append(error)
    if not having and len(refusals) == 1:
        raise refusals[0]
    if len({known.run_id for _, known in having}) != 1:
        listed = ", ".join(known.run_id for _, known in having)
        raise StoreError(
            f"several runs begin with {wanted!r}; name one: {listed}"
            if listed
            else f"none of the {len(refusals)} stores found has a run that begins with {wanted!r}; "
            "`keepwarm status` lists the runs, --store names another store"
        )
    settings_of_run, known = having[0]
    with Store.open(settings_of_run, create=False) as store:
        yield store, known


def _only_run(store: Store, path: Path) -> KnownRun:
    known = known_runs(store)
    if len(known) != 1:
        listed = ", ".join(run.run_id for run in known) or "none"
        raise StoreError(
            f"{path.parent} must have one run to be named by its directory, and has {listed}; name "
            f"the run, and the store with --store {path}"
        )
    return known[0]


def network_store_warning(settings: Settings) -> str | None:
    """A warning when the store is an SQLite file on a network file system; None otherwise."""
    url = checked_url(settings)
    if url.get_backend_name() != "sqlite":
        return None
    kind = network_file_system(Path(url.database or ""))
    return kind and (
        f"the store {redacted(url)} is on {kind}, where SQLite can lose data; name a file on a "
        "local disk with --store, or use PostgreSQL"
    )
