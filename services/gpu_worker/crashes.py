"""What a worker asks its engine about, on disk, so that the next worker knows what one died of.

A worker that dies with claims in hand says nothing any more, and its batch goes to the next one. A
preemption (SIGKILL by a scheduler) must not make claims suspects, however often it happens. So a
death counts only with evidence that it came from inside:

- Python's faulthandler wrote down a fatal signal: SIGSEGV, SIGABRT, SIGBUS, SIGFPE or SIGILL;
- since the claims were asked, the kernel killed a process for lack of memory: one of the worker's
  memory cgroup, or, where that is gone with the worker, of the next one up, or of the machine.

Any other record of a dead worker is removed unread.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import structlog

from services.node.memory import cgroup_directories
from services.node.runtime_dir import open_log, open_private_dir, take_lock

_KEPT_SECONDS = 7 * 24 * 3600.0
_MOST_EVIDENCE_CHARS = 8_000
# Reading what the kernel counts takes as long as all else that is done for a request.
_COUNTED_SECONDS = 1.0
_KILLED = "the kernel killed it (SIGKILL) because memory ran out"
_MACHINE = Path("/proc/vmstat")
_BOOT = Path("/proc/sys/kernel/random/boot_id")

Key = tuple[str, str]
"""A run and one of its claims."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Crash:
    """What is known of a claim that workers of this node died with."""

    alone: int
    """How many of them were asking about nothing else."""
    evidence: str
    memory: bool
    """Whether the kernel killed them for lack of memory."""


class Crashes:
    """One worker's record of what it is asking, and what all workers of its node died of.

    Records are no promise: where one cannot be written, as on a full disk, a crash leaves no
    evidence, and that is all. Any thread may call any method.
    """

    def __init__(self, runtime_dir: Path, worker_id: str) -> None:
        """Raises UsageError where the runtime directory is not ours, or has no file locks."""
        self._workers = open_private_dir(runtime_dir / "workers", "KEEPWARM_RUNTIME_DIR")
        self._crashed = open_private_dir(runtime_dir / "crashed", "KEEPWARM_RUNTIME_DIR")
        self._numbers = count()
        self._complained = self._caught_before = False
        self._kills: list[list[Any]] = []
        self._count_kills_at = 0.0
        self._fatal_log: IO[bytes] | None = None
        # Locked before anybody can see it: one without its lock is a dead worker's.
        new = open_private_dir(self._workers / f".{worker_id}", "KEEPWARM_RUNTIME_DIR")
        self._lock = take_lock(new / "lock")
        self._own = new.rename(self._workers / worker_id)
        self._known: frozenset[str] = frozenset()
        self.look()

    def catch_fatal_signals(self) -> None:
        """Have faulthandler write down what this process dies of. For the whole process."""
        self._caught_before = faulthandler.is_enabled()
        self._fatal_log = open_log(self._own / "fatal.log")
        faulthandler.enable(self._fatal_log)

    def close(self) -> None:
        """Remove the record: the worker ends in order."""
        if self._fatal_log is not None:
            faulthandler.disable()
            if self._caught_before:
                faulthandler.enable()
            self._fatal_log.close()
        shutil.rmtree(self._own, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def asking(self, keys: Iterable[Key], *, alone: bool = False) -> Iterator[None]:
        """Have it on disk that these claims are being asked about, until the block ends."""
        path = self._own / f"{next(self._numbers)}.json"
        if time.monotonic() >= self._count_kills_at:
            self._count_kills_at = time.monotonic() + _COUNTED_SECONDS
            self._kills = _memory_kills()
        record = {"keys": list(keys), "alone": alone, "kills": self._kills}
        try:
            path.write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            if not self._complained:
                log.warning("crash_record.unwritable", path=str(path), reason=str(error))
            self._complained = True
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    def look(self) -> None:
        """Take in what workers have died of since the last time."""
        with contextlib.suppress(OSError):
            for directory in self._workers.iterdir():
                if directory != self._own and not directory.name.startswith("."):
                    self._take_in(directory)
            oldest = time.time() - _KEPT_SECONDS
            for path in self._crashed.iterdir():
                if path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)
            self._known = frozenset(path.name for path in self._crashed.iterdir())

    @property
    def any(self) -> bool:
        """Whether workers of this node died with claims that have no outcome yet."""
        return bool(self._known)

    def of(self, key: Key) -> Crash | None:
        """What is known of a claim; None where no worker of this node died with it."""
        path = self._path(key)
        if path.name not in self._known:
            return None
        try:
            return Crash(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def forget(self, keys: Iterable[Key]) -> None:
        """They have an outcome, or what is known of them travels with them from now on."""
        for path in map(self._path, keys):
            if path.name in self._known:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
        return self._crashed / f"{digest}.json"

    def _take_in(self, directory: Path) -> None:
        """What a worker left, if it is dead."""
        lock = take_lock(directory / "lock")
        if lock is None:
            return
        try:
            records = [record for path in directory.glob("*.json") if (record := _read(path))]
            evidence = _end_of(directory / "fatal.log")
            for record in records:
                memory = not evidence and _grew(record["kills"])
                if evidence or memory:
                    self._note(record, evidence or _KILLED, memory=memory)
            if evidence or records:
                log.warning(
                    "worker.died_before",
                    worker=directory.name,
                    cause=(evidence or "unknown, such as a preemption").partition("\n")[0],
                    requests=len(records),
                )
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)

    def _note(self, record: dict[str, Any], evidence: str, *, memory: bool) -> None:
        for run_id, claim_id in record["keys"]:
            path = self._path((run_id, claim_id))
            earlier = _read(path) or {"alone": 0}
            crash = {
                "alone": earlier["alone"] + bool(record["alone"]),
                "evidence": evidence[-_MOST_EVIDENCE_CHARS:],
                "memory": memory,
            }
            new = path.with_suffix(".new")
            new.write_text(json.dumps(crash), encoding="utf-8")
            new.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _end_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[-_MOST_EVIDENCE_CHARS:].strip()
    except OSError:
        return ""


# How many processes the kernel has killed for lack of memory: by file, its inode, and the boot.


def _memory_kills() -> list[list[Any]]:
    return [counted for path in (*_cgroup_counters(), _MACHINE) if (counted := _counted(path))]


def _cgroup_counters() -> list[Path]:
    """Of our memory cgroup, of version 1 or 2, then of those that contain it."""
    names = ("memory.oom_control", "memory.events")
    return [directory / name for directory in cgroup_directories() for name in names]


def _counted(path: Path) -> list[Any] | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
        place = f"{path}:{path.stat().st_ino}:{_BOOT.read_text(encoding='ascii').strip()}"
    except OSError:
        return None
    return [place, int(found[1])] if found else None


def _grew(kills: Sequence[Sequence[Any]]) -> bool:
    """Whether a process was killed since these were counted: in the dead worker's cgroup; where
    that is gone, in the next that contains it, or on the machine.
    """
    for place, before in kills:
        now = _counted(Path(str(place).rsplit(":", 2)[0]))
        if now is not None and now[0] == place:
            return bool(now[1] > before)
    return False
