"""The output directory of `keepwarm run`: locked while the run lasts. If it is on a network file
system, the run works in a directory on a local disk.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from services.cli.screen import Screen, say
from services.cli.stores import STORE_FILE
from services.contracts.errors import StoreError
from services.contracts.settings import private_tmp
from services.contracts.values import content_id
from services.node.file_systems import network_file_system
from services.node.runtime_dir import lock_file, open_private_dir

# A private node blocks publishers when its disk has less than 256 MB left.
_MIN_FREE_BYTES = 512 * 1024 * 1024


@contextmanager
def locked_output_dir(path: Path) -> Iterator[Path]:
    """Create the directory if it does not exist, and lock it against a second `keepwarm run`.

    Raises StoreError when it cannot be written, its disk is full, or another run has locked it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(
            f"the output directory {path} cannot be used: {error.strerror}; choose another --out"
        ) from error
    try:
        if not lock_file(lock, path / ".lock", "--out"):
            raise StoreError(
                f"another `keepwarm run` is using {path}; wait for it or choose another --out"
            )
        free = _free_bytes(path)
        if free < _MIN_FREE_BYTES:
            raise StoreError(
                f"the disk of {path} has {free // 2**20} MiB free, and at least "
                f"{_MIN_FREE_BYTES // 2**20} MiB are needed; free some space or choose another "
                "--out"
            )
        yield path
    finally:
        os.close(lock)


@contextmanager
def working_dir(out: Path, console: Screen) -> Iterator[Path]:
    """The output directory, or a directory on a local disk when `out` is on a network file system;
    a message reports it. RabbitMQ and SQLite need locks that such file systems may not have, and
    SQLite's write-ahead log works on none of them.

    A store in `out` is copied to the local disk first and copied back at the end. A store that a
    killed run left on the local disk is used again.

    Raises StoreError when the store cannot be copied.
    """
    kind = network_file_system(out)
    if kind is None:
        yield out
        return
    base = private_tmp()
    if network_file_system(base.parent) or _free_bytes(base.parent) < _MIN_FREE_BYTES:
        say(
            console,
            f"Warning: {out} is on {kind}, where RabbitMQ and SQLite can lose data, and "
            f"{base.parent} is not on a local disk with enough free space. Name a local directory "
            "in TMPDIR, or with --out.",
        )
        yield out
        return
    local = open_private_dir(base, "TMPDIR") / content_id("run", str(out.resolve()))
    local.mkdir(mode=0o700, exist_ok=True)
    say(
        console,
        f"{out} is on {kind}: the store and RabbitMQ's data are in {local} during the run. "
        f"The store is copied to {out / STORE_FILE} at the end.",
    )
    kept, used = out / STORE_FILE, local / STORE_FILE
    try:
        if kept.exists() and not (used.exists() and _changed(used) > _changed(kept)):
            _copy(kept, used)
        yield local
    finally:
        if used.exists():
            _copy(used, kept)
        shutil.rmtree(local)


def _copy(store: Path, to: Path) -> None:
    """Copy a store, with its write-ahead log, completely or not at all."""
    new = to.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        with closing(sqlite3.connect(store)) as source, closing(sqlite3.connect(new)) as target:
            source.backup(target)
        for log in ("-wal", "-shm"):
            to.with_name(to.name + log).unlink(missing_ok=True)
        new.replace(to)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"the store {store} cannot be copied to {to}: {error}; free some space and rerun the "
            "same command, or name another directory with --out"
        ) from error


def _changed(store: Path) -> float:
    log = store.with_name(store.name + "-wal")
    return max(path.stat().st_mtime for path in (store, log) if path.exists())


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free
