"""Private directories, which only this user can open, and their sockets, logs and locks."""

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import IO

from services.contracts.errors import UsageError

_TAIL_BYTES = 64 * 1024
# The directory may be in memory. A log larger than the first is cut to the second.
MAX_LOG_BYTES, _KEPT_LOG_BYTES = 16 * 1024 * 1024, 1024 * 1024
_MAX_LINE_BYTES = 64 * 1024
_MAX_OLD_LOGS = 32
_SHOWN_LOG_LINES, _SHOWN_LINE_CHARS = 25, 600
_ENGINE_LOG = re.compile(r"ctx-[0-9a-f]+-[0-9a-f]+\.log")
# sockaddr_un has 108 bytes, including the final NUL.
_MAX_SOCKET_PATH_BYTES = 107


def open_runtime_dir(directory: Path) -> Path:
    """Make it, or check that it belongs to this user. Raises UsageError otherwise: another user's
    directory could lead to that user's engine.
    """
    return open_private_dir(directory, "KEEPWARM_RUNTIME_DIR")


def open_private_dir(directory: Path, setting: str) -> Path:
    """Like `open_runtime_dir`, for the directory in `setting`."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise UsageError(
            f"{setting}: cannot make {directory}: {error}; name another directory"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UsageError(
            f"{setting}: {directory} is not a directory of this user's own; name another"
        )
    directory.chmod(0o700)
    return directory


def log_tail(path: Path, lines: int = _SHOWN_LOG_LINES) -> list[str]:
    """The last lines of a log without empty ones, each cut to its end; empty if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line[-_SHOWN_LINE_CHARS:] for line in text.splitlines() if line.strip()][-lines:]


def engine_logs(directory: Path) -> list[Path]:
    """The logs of running engines, and of those that ended or never started. Links and other
    users' files are left out.
    """
    found = []
    for path in sorted(directory.iterdir()):
        if _ENGINE_LOG.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    found.append(path)
    return found


def bound_logs(directory: Path, in_use: Collection[str]) -> None:
    """Cut logs that are too large to their ends, and remove those of ended engines, except the
    latest. `in_use` are the names of running engines.
    """
    old = []
    for path in engine_logs(directory):
        if path.stem not in in_use:
            with contextlib.suppress(FileNotFoundError):
                old.append((path.lstat().st_mtime, path))
    for _, path in sorted(old, reverse=True)[_MAX_OLD_LOGS:]:
        path.unlink(missing_ok=True)
    for path in directory.glob("*.log"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size > MAX_LOG_BYTES:
                _cut(path)


def _cut(path: Path) -> None:
    """Writers append (O_APPEND), so their next line follows the rest. Lines written during the
    cut may be lost.
    """
    with path.open("r+b") as file:
        dropped = file.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
        end = file.read()
        # From the next line on. Progress bars end theirs with CR; some output has no line ends.
        if line_end := re.search(rb"[\r\n]", end[:_MAX_LINE_BYTES]):
            dropped, end = dropped + line_end.end(), end[line_end.end() :]
        file.truncate(0)
    with open_log(path) as file:
        file.write(b"[%d bytes before this line were dropped by keepwarm]\n" % dropped + end)


def quoted_tail(path: Path) -> str:
    """The end of a log, for an error message."""
    return "\n".join(f"  | {line}" for line in log_tail(path))


def open_log(path: Path) -> IO[bytes]:
    """A log, opened for appending; only its owner can read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "ab")


def lock_file(descriptor: int, path: Path, setting: str) -> bool:
    """Lock the open file at `path` until it is closed (flock(2)). False while another process has
    the lock.

    Raises UsageError that names the setting of the path, if the file system has no locks: NFS
    without a lock service, Lustre without `-o flock`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"{setting}: the file system of {path.parent} has no file locks ({error.strerror}), "
            "so two processes could work in it at once; name a directory on a local disk"
        ) from error
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    free = take_lock(path)
    if free is not None:
        os.close(free)
    return free is None


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed; None if another process holds it.

    Raises UsageError if the file system has no locks.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if not lock_file(lock, path, "KEEPWARM_RUNTIME_DIR"):
                os.close(lock)
                return None
            if is_same_file(os.fstat(lock), path):
                return lock
        except UsageError:
            os.close(lock)
            raise
        os.close(lock)  # the file was removed between the two steps: open the new one


def is_same_file(status: os.stat_result, path: Path) -> bool:
    """Whether `path` is this file, and not another one that replaced it."""
    try:
        return os.path.samestat(status, path.lstat())
    except FileNotFoundError:
        return False


def keeper_lock(directory: Path) -> Path:
    """The lock that the keeper of this node holds."""
    return directory / "keeper.lock"


def keeper_socket(directory: Path) -> Path:
    """The socket on which the keeper of this node listens."""
    return socket_path(directory, "keeper")


def socket_path(directory: Path, name: str) -> Path:
    """A path for a unix socket. Raises UsageError if it is too long."""
    path = directory / f"{name}.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: {path} is longer than the {_MAX_SOCKET_PATH_BYTES} bytes that "
            "a unix socket's path may have; name a shorter directory"
        )
    return path
