"""The result of a check of `keepwarm doctor`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from services.contracts import Settings

GIB = 1024**3
RECOMMENDED_FREE_BYTES = 2 * GIB
"""About the size of some models' compile caches, or of a store of a million claims."""
# Other nodes see locks and sockets on these late or not at all.
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "fuse.sshfs")


@dataclass(frozen=True)
class Finding:
    """`warning`: it works, but the user should know about it."""

    level: Literal["ok", "warning"]
    message: str


Check = Callable[[Settings], Finding]
"""Raises the error that a service would end with, so that each problem is described once."""


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warning(message: str) -> Finding:
    return Finding("warning", message)


def shared_file_system(path: Path) -> str | None:
    """The type of network file system that a path is on; None for a local one."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    path = path.resolve()
    kind = next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "")
    return kind if kind.startswith(_SHARED_FILE_SYSTEMS) else None
