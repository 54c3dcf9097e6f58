"""A record file for each engine of this node, with a lock that its keeper holds until the engine
has ended.
"""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog
from pydantic import ConfigDict, Field, ValidationError

from services.contracts import ContextSpec
from services.contracts.startup import StartupPhases
from services.contracts.values import Value
from services.node.runtime_dir import take_lock

State = Literal["waiting", "starting", "warm", "asleep", "stopping"]

_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 20, 0.05
_MAX_RECORD_BYTES = 1024 * 1024

log = structlog.get_logger(__name__)


class ContextRecord(Value):
    """The public state of an engine. Times are those of the kernel's monotonic clock, which never
    jumps and is the same for all processes of a node. Unknown fields are ignored: a newer keeper
    may write more of them.
    """

    model_config = ConfigDict(extra="ignore", validate_by_name=True, serialize_by_alias=True)

    name: str
    context: ContextSpec
    device: str
    state: State
    progress: str = Field(default="", alias="says")
    """While it starts: the last line of its log, or what it waits for."""
    pid: int | None = None
    pid_started: float | None = None
    """When the process started, since a pid alone may be used again."""
    socket: str
    log: str
    since: float
    """When a worker first asked for it."""
    last_used: float
    """When a worker last attached or detached."""
    attached: int = 0
    """How many workers hold a lease now."""
    used: int = 0
    """How many leases there were in all."""
    memory_bytes: int | None = None
    demand: int = 0
    """How many claims wait for it, as far as this node's workers know."""
    phases: StartupPhases | None = None
    adapters: tuple[str, ...] = ()
    """The adapters that it has loaded."""

    @property
    def seconds(self) -> float:
        """The time since a worker first asked for it."""
        return max(0.0, time.monotonic() - self.since)


class RecordFile:
    """The record file of one of the keeper's engines, locked until `close`."""

    def __init__(self, directory: Path, name: str) -> None:
        """Raises BlockingIOError when another keeper has it."""
        self._path = directory / f"{name}.json"
        self._lock_path = directory / f"{name}.lock"
        self._written = True
        for _ in range(_LOCK_TRIES):
            lock = take_lock(self._lock_path)
            if lock is not None:
                self._lock = lock
                return
            time.sleep(_LOCK_PAUSE_SECONDS)  # `live_records` of another process tries it briefly
        raise BlockingIOError(f"{self._lock_path} is held by another keeper")

    def write(self, record: ContextRecord) -> None:
        """Replace the file atomically: a reader sees the old record or the new one.

        If it cannot be written, as on a full disk, the old record stays and one error is logged.
        The engine does not depend on it.
        """
        try:
            self._replace(record)
        except OSError as error:
            if self._written:
                log.error("record.unwritable", path=str(self._path), reason=str(error))
            self._written = False
        else:
            self._written = True

    def _replace(self, record: ContextRecord) -> None:
        new = self._path.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(record.model_dump_json())
        new.replace(self._path)

    def close(self) -> None:
        """Remove the file: the engine has ended."""
        self._path.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)


def live_records(directory: Path) -> list[ContextRecord]:
    """The engines of this node, the oldest first. `directory` must be private to this user.

    A record that no keeper has locked is stale: it is removed, with the engine's socket. A record
    that is not a plain file of this user is ignored.
    """
    return sorted(_live(directory), key=lambda record: record.since)


def _live(directory: Path) -> Iterator[ContextRecord]:
    for path in directory.glob("ctx-*.json"):
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                log.warning("record.not_ours", path=str(path))
                continue
            if _remove_if_stale(path):
                log.info("record.stale", path=str(path))
                continue
            yield ContextRecord.model_validate_json(path.read_bytes()[:_MAX_RECORD_BYTES])
        except FileNotFoundError:
            continue  # it has just ended
        except (OSError, ValidationError):
            log.warning("record.unreadable", path=str(path))


def _remove_if_stale(path: Path) -> bool:
    lock = take_lock(path.with_suffix(".lock"))
    if lock is None:
        return False
    try:
        for suffix in (".json", ".sock", ".lock"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)
