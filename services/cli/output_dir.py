"""The output directory of `keepwarm run`: ours while we run, checked before anything costs time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.contracts import locks
from services.contracts.errors import StoreError

# A private node blocks publishers when its disk has less than 256 MB left.
LEAST_FREE_BYTES = 512 * 1024 * 1024


@contextmanager
def held_output_dir(path: Path) -> Iterator[Path]:
    """Make it if need be, and hold it against a second `keepwarm run`.

    Raises StoreError when it cannot be written, has no room, or is held by another.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(
            f"the output directory {path} cannot be used: {error.strerror}; name another with --out"
        ) from error
    try:
        if not locks.take(lock, path / ".lock", "--out"):
            raise StoreError(
                f"another `keepwarm run` works in {path}; wait for it, or name another with --out"
            )
        free = shutil.disk_usage(path).free
        if free < LEAST_FREE_BYTES:
            raise StoreError(
                f"the disk of {path} has {free // 2**20} MiB left, and at least "
                f"{LEAST_FREE_BYTES // 2**20} MiB are needed; make room, or name another --out"
            )
        yield path
    finally:
        os.close(lock)
