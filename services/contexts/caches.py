"""The engines' compile caches on this node, and the measurements of their last starts.

Each engine has its own directory under `KEEPWARM_CACHE_DIR`, locked while the engine starts: two
never write to the same one. vLLM does not write all compiled files atomically (not its index,
nor C++ libraries), so the next start deletes what an interrupted start wrote. Files of earlier
starts are kept; otherwise a node that is preempted often would never have a cache.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import ValidationError

from services.contracts.errors import EngineStartError
from services.contracts.startup import StartupPhases
from services.contracts.values import Value
from services.node.runtime_dir import lock_file, open_private_dir

_UNFINISHED = "unfinished"
_STARTUP = "startup.json"
_REMOVED = ".removed"
# Caches of engines, and data that a killed keeper's private RabbitMQ node left behind.
_ENGINE_NAME = re.compile(r"ctx-[0-9a-f]+-[0-9a-f]+")
_BROKER_NAME = re.compile(r"rabbitmq-[0-9a-f]+")
# A node in use writes something within this time.
_BROKER_UNUSED_SECONDS = 24 * 3600.0

log = structlog.get_logger(__name__)


class PastStart(Value):
    """Measurements of an engine's last start on this node."""

    phases: StartupPhases
    memory_bytes: int | None = None
    """None if it could not be measured."""

    @property
    def restart_seconds(self) -> float:
        """Seconds to restart it from a fork server, which has done the imports, with the weights
        already on the node. Imports and fetch ran at the same time.
        """
        phases = self.phases
        return max(0.0, (phases.total or 0.0) - max(phases.imports or 0.0, phases.fetch or 0.0))


@dataclass(frozen=True, slots=True)
class Cache:
    """One directory of the caches."""

    name: str
    size_bytes: int
    unused_seconds: float
    """Since anything in it was written; every start of the engine writes to it."""


class EngineCaches:
    """All caches of this node. Several keepers of one user may share it."""

    def __init__(self, directory: Path) -> None:
        """Raises UsageError when the directory cannot be created or belongs to another user."""
        self._directory = open_private_dir(directory, "KEEPWARM_CACHE_DIR")

    def lock_path(self, name: str) -> Path:
        """The file that is locked while a keeper starts the engine of this name."""
        return self._directory / f"{name}.lock"

    def is_starting(self, name: str) -> bool:
        """Whether a keeper starts the engine of this name now."""
        try:
            lock = os.open(self.lock_path(name), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not lock_file(lock, self.lock_path(name), "KEEPWARM_CACHE_DIR")
        finally:
            os.close(lock)

    @contextmanager
    def starting(self, name: str) -> Iterator[Path | None]:
        """The engine's directory while the engine starts; None if another keeper is starting it.
        Never waits, because the caller may hold locks.

        If the start fails, all compiled files are deleted: they may be the cause.
        """
        directory = self._directory / name
        # A person may have deleted it meanwhile to free disk space.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(name) as ours:
            if not ours:
                yield None
                return
            directory.mkdir(mode=0o700, exist_ok=True)
            marker = directory / _UNFINISHED
            if marker.exists():
                _delete_since(directory, since_ns=marker.lstat().st_ctime_ns)
            marker.touch()
            try:
                yield directory
            except EngineStartError:
                _delete_since(directory)
                raise
            # Not in a `finally`: an interrupted start must leave its marker.
            marker.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Whether the lock is ours, until the block ends. Never waits."""
        lock = os.open(self.lock_path(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield lock_file(lock, self.lock_path(name), "KEEPWARM_CACHE_DIR")
        finally:
            os.close(lock)

    def save_start(self, name: str, start: PastStart) -> None:
        """Write the measurements of a start. On a full disk they are only logged as not written."""
        path = self._directory / name / _STARTUP
        new = path.with_suffix(".new")
        try:
            new.write_text(start.model_dump_json(), encoding="utf-8")
            new.replace(path)
        except OSError as error:
            log.error("start.not_remembered", path=str(path), reason=str(error))

    def last_start(self, name: str) -> PastStart | None:
        """The measurements of this engine's last start; None without any."""
        try:
            return PastStart.model_validate_json((self._directory / name / _STARTUP).read_bytes())
        except (OSError, ValidationError):
            return None

    def last_starts(self) -> dict[str, PastStart]:
        """The last start of every engine in the caches, by the engine's name."""
        names = [path.parent.name for path in self._directory.glob(f"*/{_STARTUP}")]
        return {name: past for name in names if (past := self.last_start(name)) is not None}

    def find(self) -> list[Cache]:
        """All caches, the longest unused first."""
        found = []
        for directory in self._directory.iterdir():
            if directory.name.endswith(_REMOVED):  # the process that removed it was killed
                shutil.rmtree(directory, ignore_errors=True)
            elif _ENGINE_NAME.fullmatch(directory.name) or _BROKER_NAME.fullmatch(directory.name):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found.append(_measure(directory))
        return sorted(found, key=lambda cache: -cache.unused_seconds)

    def remove(self, cache: Cache) -> bool:
        """Delete a cache. False if its engine is starting or a running node may use it."""
        if _BROKER_NAME.fullmatch(cache.name) and cache.unused_seconds < _BROKER_UNUSED_SECONDS:
            return False
        with self._locked(cache.name) as ours:
            if not ours:
                return False
            renamed = self._directory / f"{cache.name}{_REMOVED}"
            with contextlib.suppress(FileNotFoundError):
                # Renamed first, so that an engine never finds a part of it.
                (self._directory / cache.name).rename(renamed)
                shutil.rmtree(renamed, ignore_errors=True)
            return True

    def bound(self, most_bytes: int, in_use: Collection[str]) -> None:
        """Remove caches, the longest unused first, until the rest has at most `most_bytes`."""
        caches = self.find()
        size = sum(cache.size_bytes for cache in caches)
        for cache in caches:
            if size <= most_bytes:
                return
            if cache.name not in in_use and self.remove(cache):
                size -= cache.size_bytes
                log.info("cache.removed", name=cache.name, bytes=cache.size_bytes)


def _measure(directory: Path) -> Cache:
    """Raises FileNotFoundError if it is being removed."""
    size, written = 0, directory.stat().st_mtime
    for root, _, files in os.walk(directory):
        for name in files:
            status = Path(root, name).lstat()
            size += status.st_size
            written = max(written, status.st_mtime)
    return Cache(directory.name, size, max(0.0, time.time() - written))


def _delete_since(directory: Path, since_ns: int = 0) -> None:
    """Delete files changed since then, except our own, which are written atomically.

    Uses ctime, because programs can set mtime, as copying tools do.
    """
    ours = {directory / _UNFINISHED, directory / _STARTUP}
    for root, folders, files in os.walk(directory, topdown=False):
        for path in (Path(root, name) for name in files):
            if path not in ours and path.lstat().st_ctime_ns >= since_ns:
                path.unlink()
        for name in folders:
            with contextlib.suppress(OSError):  # it is not empty
                Path(root, name).rmdir()
