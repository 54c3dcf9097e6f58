"""Which directories are on network file systems."""

from pathlib import Path

import psutil

# Other nodes see locks and sockets on these late or not at all.
_NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "fuse.sshfs")


def network_file_system(path: Path) -> str | None:
    """The type of network file system that a path is on; None for a local one."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    path = path.resolve()
    kind = next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "")
    return kind if kind.startswith(_NETWORK_FILE_SYSTEMS) else None
