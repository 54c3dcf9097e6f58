"""Locks on files that keep a second process out of a directory (flock(2))."""

import fcntl
from pathlib import Path

from services.contracts.errors import UsageError


def take(descriptor: int, path: Path, setting: str) -> bool:
    """Lock the open file at `path`, until it is closed. False while another process has the lock.

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
