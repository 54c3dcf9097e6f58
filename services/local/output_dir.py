"""The output directory of `keepwarm run`: checked before the run starts, locked while it lasts."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.contracts.errors import StoreError
from services.node.runtime_dir import lock_file

# A private node blocks publishers when its disk has less than 256 MB left.
MIN_FREE_BYTES = 512 * 1024 * 1024


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
        free = shutil.disk_usage(path).free
        if free < MIN_FREE_BYTES:
            raise StoreError(
                f"the disk of {path} has {free // 2**20} MiB free, and at least "
                f"{MIN_FREE_BYTES // 2**20} MiB are needed; free some space or choose another --out"
            )
        yield path
    finally:
        os.close(lock)
