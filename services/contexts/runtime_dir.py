"""Directories of our own, closed to every other user: that of sockets, records and logs first."""

import os
import stat
from pathlib import Path

from services.contracts.errors import UsageError

_TAIL_BYTES = 64 * 1024
_SHOWN_LOG_LINES = 25
# sockaddr_un holds 108 bytes, with the NUL at the end.
_LONGEST_SOCKET_PATH = 107


def open_runtime_dir(directory: Path) -> Path:
    """Make it, or check that it is ours alone. Raises UsageError: a stranger's directory could
    hand us a stranger's engine.
    """
    return open_private_dir(directory, "KEEPWARM_RUNTIME_DIR")


def open_private_dir(directory: Path, setting: str) -> Path:
    """As `open_runtime_dir`, for the directory that `setting` names."""
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
    """The end of a log, without empty lines; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def keeper_socket(directory: Path) -> Path:
    """Where the keeper of this node listens."""
    return socket_path(directory, "keeper")


def socket_path(directory: Path, name: str) -> Path:
    """A path for a unix socket. Raises UsageError when it is longer than one may be."""
    path = directory / f"{name}.sock"
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: {path} is longer than the {_LONGEST_SOCKET_PATH} bytes that a "
            "unix socket's path may have; name a shorter directory"
        )
    return path
