"""What a check of `keepwarm doctor` finds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from services.contracts import Settings

GIB = 1024**3
ROOM_BYTES = 2 * GIB
"""Compile caches of some models, and a store of a million claims, are about that large."""
# Locks and sockets on these are seen by other nodes, late, or not at all.
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "fuse.sshfs")


@dataclass(frozen=True)
class Finding:
    """`note`: it works, and a person should know about it."""

    level: Literal["well", "note"]
    says: str


Check = Callable[[Settings], Finding]
"""Raises the error that a service would end with, so that what is wrong and how to mend it is said
in one place.
"""


def well(says: str) -> Finding:
    return Finding("well", says)


def note(says: str) -> Finding:
    return Finding("note", says)


def shared_file_system(path: Path) -> str | None:
    """The kind of network file system that a path is on; None where it is the node's own."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    place = path.resolve()
    kind = next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "")
    return kind if kind.startswith(_SHARED_FILE_SYSTEMS) else None
