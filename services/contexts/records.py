"""What is warm on this node, written down: a record for each engine, with a lock that its keeper
holds for as long as the engine lives.
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
    """An engine as everybody on its node may know it. Times are the kernel's monotonic
    clock, which all processes of a node share: it does not jump. A keeper of a newer version may
    know more of it.
    """

    model_config = ConfigDict(extra="ignore", validate_by_name=True, serialize_by_alias=True)

    name: str
    context: ContextSpec
    device: str
    state: State
    progress: str = Field(default="", alias="says")
    """The last line of its log, while it starts."""
    pid: int | None = None
    pid_started: float | None = None
    """When the process started: with its number, this names it for good."""
    socket: str
    log: str
    since: float
    """When it was first asked for."""
    last_used: float
    """When a worker last came or went; one that is attached uses it now."""
    attached: int = 0
    """Workers that use it now."""
    used: int = 0
    """Workers that ever attached."""
    memory_bytes: int | None = None
    demand: int = 0
    """Claims that wait for it, as far as the workers here have heard."""
    phases: StartupPhases | None = None
    adapters: tuple[str, ...] = ()
    """The adapters that workers asked it for."""

    @property
    def seconds(self) -> float:
        """How long it has been here."""
        return max(0.0, time.monotonic() - self.since)


class RecordFile:
    """The record of an engine that we keep. Nobody else has it while this object is open."""

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
            time.sleep(_LOCK_PAUSE_SECONDS)  # somebody looks whether we live, which takes no time
        raise BlockingIOError(f"{self._lock_path} is held by another keeper")

    def write(self, record: ContextRecord) -> None:
        """At once and whole: a reader sees the old one or the new one.

        Where it cannot be written, as on a full disk, readers have the old one, and the log says so
        once: the engine is none the worse for it, and its keeper goes on.
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
        """The engine is gone."""
        self._path.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)


def live_records(directory: Path) -> list[ContextRecord]:
    """The engines that live on this node, the longest-lived first. `directory` is ours alone.

    A record without its keeper's lock is stale, and removed with what belonged to it; one that is
    not a plain file of this user's is not looked at.
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
