"""The directory of sockets and engine logs, closed to every other user."""

import os
import stat
from pathlib import Path

from services.contracts.errors import UsageError

# sockaddr_un holds 108 bytes, with the NUL at the end.
_LONGEST_SOCKET_PATH = 107


def open_runtime_dir(directory: Path) -> Path:
    """Make it, or check that it is ours alone. Raises UsageError: a stranger's directory could
    hand us a stranger's engine.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: cannot make {directory}: {error}; name another directory"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: {directory} is not a directory of this user's own; name another"
        )
    directory.chmod(0o700)
    return directory


def socket_path(directory: Path, name: str) -> Path:
    """A path for a unix socket, with no leftover of an earlier one. Raises UsageError."""
    path = directory / f"{name}.sock"
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: {path} is longer than the {_LONGEST_SOCKET_PATH} bytes that a "
            "unix socket's path may have; name a shorter directory"
        )
    path.unlink(missing_ok=True)
    return path
