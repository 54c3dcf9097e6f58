"""What engines have compiled, handed on to others of their kind: much is alike for every model.

Inductor and Triton name what they compile by its content, so what does not fit a model is not found
and does no harm. Each engine gets a copy of its own, and writes to nobody else's.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

INDUCTOR, TRITON = "inductor", "triton"
"""Directories in an engine's own, as its environment names them."""

# Kernels of many models come together in what is handed on. One that grew beyond this starts anew.
_MOST_BYTES = 512 * 1024**2

log = structlog.get_logger(__name__)


class Compiled:
    """What was compiled by engines of one kind: one device, interpreter and environment."""

    def __init__(self, caches: Path, kind: str) -> None:
        self._shared = caches / f"compiled-{kind}"
        self._new = caches / f"compiled-{kind}.new"
        self._lock_file = caches / f"compiled-{kind}.lock"

    def hand_to(self, engine: Path) -> None:
        """Put it into a new engine's directory. It starts without where that fails."""
        try:
            with self._locked(fcntl.LOCK_SH):
                for name in (INDUCTOR, TRITON):
                    if (self._shared / name).is_dir():
                        shutil.copytree(self._shared / name, engine / name)
        except OSError as error:
            log.warning("compiled.unusable", reason=str(error))
            for name in (INDUCTOR, TRITON):
                shutil.rmtree(engine / name, ignore_errors=True)

    def take_from(self, engine: Path) -> None:
        """Keep for others what an engine's first start has left, which is whole: it has ended."""
        try:
            with self._locked(fcntl.LOCK_EX):
                for old in (self._new, self._shared):  # one may be left of a keeper that was killed
                    shutil.rmtree(old, ignore_errors=True)
                parts = [engine / name for name in (INDUCTOR, TRITON) if (engine / name).is_dir()]
                if sum(_bytes(part) for part in parts) <= _MOST_BYTES:
                    self._new.mkdir(mode=0o700)
                    for part in parts:
                        shutil.copytree(part, self._new / part.name)
                    self._new.replace(self._shared)
        except OSError as error:
            log.warning("compiled.not_kept", reason=str(error))

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
