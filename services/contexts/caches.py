"""What makes the next cold start cheaper: compile caches on this node, and how starts went.

Each engine has a directory of its own under `KEEPWARM_CACHE_DIR`, so that no two write to one: it
is locked while its engine starts. Not all that is compiled is written at once and whole (vLLM's
index and C++ libraries are not), so what a start wrote that was given up or killed is thrown away
at the next. What earlier starts wrote stays: nodes that are preempted often would never have any.
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

from services.contracts import locks
from services.contracts.errors import EngineStartError
from services.contracts.startup import StartupPhases
from services.contracts.values import Value
from services.node.runtime_dir import open_private_dir

_UNFINISHED = "unfinished"
_STARTUP = "startup.json"
_REMOVED = ".removed"
# Of an engine; and the data of a private RabbitMQ node (`keepwarm keeper`) whose keeper was killed.
_ENGINE_NAME = re.compile(r"ctx-[0-9a-f]+-[0-9a-f]+")
_BROKER_NAME = re.compile(r"rabbitmq-[0-9a-f]+")
# A node that is in use has written something by then.
_BROKER_UNUSED_SECONDS = 24 * 3600.0

log = structlog.get_logger(__name__)


class PastStart(Value):
    """What is known of an engine from its last start here."""

    phases: StartupPhases
    memory_bytes: int | None = None
    """None where it could not be told."""

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
    """Since anything in it was written: an engine's last start is noted there."""


class EngineCaches:
    """The directory of all of them. Safe for several keepers of one user."""

    def __init__(self, directory: Path) -> None:
        """Raises UsageError when it cannot be made, or is another user's."""
        self._directory = open_private_dir(directory, "KEEPWARM_CACHE_DIR")

    def lock_path(self, name: str) -> Path:
        """The file that is locked while a keeper starts the engine of this name."""
        return self._directory / f"{name}.lock"

    def busy(self, name: str) -> bool:
        """Whether a keeper starts the engine of this name now."""
        try:
            lock = os.open(self.lock_path(name), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not locks.take(lock, self.lock_path(name), "KEEPWARM_CACHE_DIR")
        finally:
            os.close(lock)

    @contextmanager
    def starting(self, name: str) -> Iterator[Path | None]:
        """The engine's own directory, for as long as the start lasts; None while another keeper
        starts this engine. Never waits: the caller may hold what others wait for.

        A start that fails may have failed with what it found: nothing compiled is left by it.
        """
        directory = self._directory / name
        # It may have been deleted since: that is how a person makes room.
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
            # Not in a `finally`: a start that is broken off leaves its marker.
            marker.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Whether the lock is ours, until the block ends. Never waits."""
        lock = os.open(self.lock_path(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield locks.take(lock, self.lock_path(name), "KEEPWARM_CACHE_DIR")
        finally:
            os.close(lock)

    def remember(self, name: str, start: PastStart) -> None:
        """Where the disk has room for it: the engine is well without."""
        path = self._directory / name / _STARTUP
        new = path.with_suffix(".new")
        try:
            new.write_text(start.model_dump_json(), encoding="utf-8")
            new.replace(path)
        except OSError as error:
            log.error("start.not_remembered", path=str(path), reason=str(error))

    def recall_all(self) -> dict[str, PastStart]:
        """Of each engine that was ever started here, by its name."""
        names = [path.parent.name for path in self._directory.glob(f"*/{_STARTUP}")]
        return {name: past for name in names if (past := self.recall(name)) is not None}

    def find(self) -> list[Cache]:
        """All that there are, the longest unused first."""
        found = []
        for directory in self._directory.iterdir():
            if directory.name.endswith(_REMOVED):  # whoever removed it was killed
                shutil.rmtree(directory, ignore_errors=True)
            elif _ENGINE_NAME.fullmatch(directory.name) or _BROKER_NAME.fullmatch(directory.name):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found.append(_measure(directory))
        return sorted(found, key=lambda cache: -cache.unused_seconds)

    def remove(self, cache: Cache) -> bool:
        """False where its engine starts just now, or where it may belong to a node that runs."""
        if _BROKER_NAME.fullmatch(cache.name) and cache.unused_seconds < _BROKER_UNUSED_SECONDS:
            return False
        with self._locked(cache.name) as ours:
            if not ours:
                return False
            renamed = self._directory / f"{cache.name}{_REMOVED}"
            with contextlib.suppress(FileNotFoundError):
                # At once and whole: an engine never finds half of it.
                (self._directory / cache.name).rename(renamed)
                shutil.rmtree(renamed, ignore_errors=True)
            return True

    def bound(self, most_bytes: int, in_use: Collection[str]) -> None:
        """Remove those that were unused for longest, until all of them fit."""
        caches = self.find()
        size = sum(cache.size_bytes for cache in caches)
        for cache in caches:
            if size <= most_bytes:
                return
            if cache.name not in in_use and self.remove(cache):
                size -= cache.size_bytes
                log.info("cache.removed", name=cache.name, bytes=cache.size_bytes)

    def recall(self, name: str) -> PastStart | None:
        try:
            return PastStart.model_validate_json((self._directory / name / _STARTUP).read_bytes())
        except (OSError, ValidationError):
            return None


def _measure(directory: Path) -> Cache:
    """Raises FileNotFoundError where it is being removed."""
    size, written = 0, directory.stat().st_mtime
    for root, _, files in os.walk(directory):
        for name in files:
            status = Path(root, name).lstat()
            size += status.st_size
            written = max(written, status.st_mtime)
    return Cache(directory.name, size, max(0.0, time.time() - written))


def _delete_since(directory: Path, since_ns: int = 0) -> None:
    """What was written since then, but for our own files, which are written whole.

    Goes by when a file last changed, which its writer cannot set, as a copy sets the time of its
    contents.
    """
    ours = {directory / _UNFINISHED, directory / _STARTUP}
    for root, folders, files in os.walk(directory, topdown=False):
        for path in (Path(root, name) for name in files):
            if path not in ours and path.lstat().st_ctime_ns >= since_ns:
                path.unlink()
        for name in folders:
            with contextlib.suppress(OSError):  # it is not empty
                Path(root, name).rmdir()
