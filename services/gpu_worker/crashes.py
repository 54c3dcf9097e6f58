"""Records on disk of the claims that a worker asks about, so that the next worker on the node knows
which claims a crashed one was working on.

A crashed worker cannot report anything, and the broker delivers its batches to other workers. A
preemption (SIGKILL from a scheduler) must never quarantine claims, however often it happens. So a
crash counts only with evidence that its cause was inside the worker:

- Python's faulthandler recorded a fatal signal: SIGSEGV, SIGABRT, SIGBUS, SIGFPE or SIGILL (a
  worker whose tokenizer hangs ends itself with SIGABRT);
- since the request began, the kernel killed a process for lack of memory: in the worker's memory
  cgroup; if that is gone, in the next one up that still exists; else on the machine.

Without evidence, a dead worker's records are removed and count for nothing.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, NoReturn

import structlog

from services.node.memory import MACHINE_OOM_COUNTERS, cgroup_directories, oom_kills
from services.node.runtime_dir import open_log, open_private_dir, take_lock

_KEPT_SECONDS = 7 * 24 * 3600.0
# Of the evidence: its beginning says what happened, its end has the stacks.
_MAX_FIRST_CHARS, _MAX_LAST_CHARS = 1_000, 7_000
# Reading the kernel's counters costs as much as all other work for a request, so their values are
# reused for this long.
_KILL_COUNT_MAX_AGE_SECONDS = 1.0
_KILLED = "the kernel killed it (SIGKILL) because memory ran out"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Key = tuple[str, str]
"""A run id and a claim id."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Crash:
    """What is known of a claim that workers of this node were asking about when they crashed."""

    alone: int
    """How many of these workers were asking about this claim alone."""
    evidence: str
    memory: bool
    """Whether the kernel killed them for lack of memory."""


class CrashRecords:
    """One worker's records of its requests, and the crashes of all workers of its node.

    Records are best effort: if one cannot be written, for example on a full disk, a crash leaves no
    evidence. Any thread may call any method.
    """

    def __init__(self, runtime_dir: Path, worker_id: str) -> None:
        """Raises UsageError if the runtime directory is another user's, or has no file locks."""
        self._workers_dir = open_private_dir(runtime_dir / "workers", "KEEPWARM_RUNTIME_DIR")
        self._crashed_dir = open_private_dir(runtime_dir / "crashed", "KEEPWARM_RUNTIME_DIR")
        self._request_numbers = count()
        self._warned = self._faulthandler_was_enabled = False
        self._kills: list[list[Any]] = []
        self._next_kill_count_at = 0.0
        self._fatal_log: IO[bytes] | None = None
        # Locked before it gets its final name: an unlocked directory counts as a dead worker's.
        new = open_private_dir(self._workers_dir / f".{worker_id}", "KEEPWARM_RUNTIME_DIR")
        self._lock = take_lock(new / "lock")
        self._own_dir = new.rename(self._workers_dir / worker_id)
        self._crashed_names: frozenset[str] = frozenset()
        self.collect()

    def catch_fatal_signals(self) -> None:
        """Let faulthandler record a fatal signal of this process."""
        self._faulthandler_was_enabled = faulthandler.is_enabled()
        self._fatal_log = open_log(self._own_dir / "fatal.log")
        faulthandler.enable(self._fatal_log)

    def abort(self, why: str) -> NoReturn:
        """End this process with SIGABRT. The evidence is `why` and the stack of each thread."""
        log.error("worker.aborted", reason=why)
        if self._fatal_log is not None:
            self._fatal_log.write(f"{why}\n".encode())
            self._fatal_log.flush()
        os.abort()

    def close(self) -> None:
        """Remove the worker's records: it ends normally."""
        if self._fatal_log is not None:
            faulthandler.disable()
            if self._faulthandler_was_enabled:
                faulthandler.enable()
            self._fatal_log.close()
        shutil.rmtree(self._own_dir, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def recorded(self, keys: Iterable[Key], *, alone: bool = False) -> Iterator[None]:
        """Keep a record of a request about these claims on disk until the block ends."""
        path = self._own_dir / f"{next(self._request_numbers)}.json"
        if time.monotonic() >= self._next_kill_count_at:
            self._next_kill_count_at = time.monotonic() + _KILL_COUNT_MAX_AGE_SECONDS
            self._kills = _memory_kills()
        record = {"keys": list(keys), "alone": alone, "kills": self._kills}
        try:
            path.write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            if not self._warned:
                log.warning("crash_record.unwritable", path=str(path), reason=str(error))
            self._warned = True
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    def collect(self) -> None:
        """Collect the crashes of workers that died since the last call."""
        # Other workers of the node do the same, so each entry may be gone when it is opened.
        for directory in _entries(self._workers_dir):
            if directory != self._own_dir and not directory.name.startswith("."):
                with contextlib.suppress(OSError):
                    self._collect_from(directory)
        oldest = time.time() - _KEPT_SECONDS
        for path in _entries(self._crashed_dir):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
        self._crashed_names = frozenset(path.name for path in _entries(self._crashed_dir))

    @property
    def any(self) -> bool:
        """Whether there are crashes with claims that have no outcome yet."""
        return bool(self._crashed_names)

    def get(self, key: Key) -> Crash | None:
        """The crashes with a claim; None if no worker of this node crashed with it."""
        path = self._path(key)
        if path.name not in self._crashed_names:
            return None
        try:
            return Crash(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def forget(self, keys: Iterable[Key]) -> None:
        """Remove the crashes with claims that have an outcome, or whose message counts them."""
        for path in map(self._path, keys):
            if path.name in self._crashed_names:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
        return self._crashed_dir / f"{digest}.json"

    def _collect_from(self, directory: Path) -> None:
        """Collect a worker's crash, and remove its records, if it is dead."""
        lock = take_lock(directory / "lock")
        if lock is None:
            return
        try:
            records = [record for path in directory.glob("*.json") if (record := _read_json(path))]
            evidence = _read_evidence(directory / "fatal.log")
            for record in records:
                memory = not evidence and _has_killed_since(record["kills"])
                if evidence or memory:
                    self._save(record, evidence or _KILLED, memory=memory)
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

    def _save(self, record: dict[str, Any], evidence: str, *, memory: bool) -> None:
        for run_id, claim_id in record["keys"]:
            path = self._path((run_id, claim_id))
            earlier = _read_json(path) or {"alone": 0}
            crash = {
                "alone": earlier["alone"] + bool(record["alone"]),
                "evidence": evidence,
                "memory": memory,
            }
            new = path.with_suffix(".new")
            new.write_text(json.dumps(crash), encoding="utf-8")
            new.replace(path)


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _read_evidence(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    if len(text) <= _MAX_FIRST_CHARS + _MAX_LAST_CHARS:
        return text
    return f"{text[:_MAX_FIRST_CHARS]}\n...\n{text[-_MAX_LAST_CHARS:]}"


# A kill count: which counter (file, inode and boot id), and how many processes the kernel killed.


def _memory_kills() -> list[list[Any]]:
    return [
        kills
        for path in (*_cgroup_counters(), MACHINE_OOM_COUNTERS)
        if (kills := _kill_count(path))
    ]


def _cgroup_counters() -> list[Path]:
    """Counters of our memory cgroup (version 1 or 2), then of those that contain it."""
    names = ("memory.oom_control", "memory.events")
    return [directory / name for directory in cgroup_directories() for name in names]


def _kill_count(path: Path) -> list[Any] | None:
    kills = oom_kills(path)
    if kills is None:
        return None
    try:
        counter = f"{path}:{path.stat().st_ino}:{_BOOT_ID.read_text(encoding='ascii').strip()}"
    except OSError:
        return None
    return [counter, kills]


def _has_killed_since(kills: Sequence[Sequence[Any]]) -> bool:
    """Whether the kernel killed a process after these counts: in the dead worker's cgroup; if that
    is gone, in the next one up that still exists; else on the machine.
    """
    for counter, before in kills:
        now = _kill_count(Path(str(counter).rsplit(":", 2)[0]))
        if now is not None and now[0] == counter:
            return bool(now[1] > before)
    return False
