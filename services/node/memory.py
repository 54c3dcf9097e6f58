"""How much of the node's memory is ours: all of it, or less by a limit of a cgroup or of Slurm.

A container, a batch job or a service of systemd may have less than the machine, and the kernel
kills what takes more. A limit may be set on any cgroup that contains ours: the least one counts,
and the least of what is left of each.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_PROC = Path("/proc/self")
_MIB = 1024**2
_SLURM_LIMITS = (
    ("SLURM_MEM_PER_NODE", None),
    ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
    ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
)


@dataclass(frozen=True, slots=True)
class _Limit:
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """What the kernel calls it, in one version of cgroups."""

    limits: Sequence[str]
    used: str
    cache: Sequence[str]
    """Entries of memory.stat."""


# https://docs.kernel.org/admin-guide/cgroup-v2.html: over `high` a cgroup is slowed down until it
# is of no use. https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def available_bytes() -> int:
    """What could be allocated now without swapping, and without more than any limit allows."""
    return min([psutil.virtual_memory().available, *(limit.free_bytes for limit in _limits())])


def total_bytes() -> int:
    """All that there is for us and whoever shares our limits."""
    return min([psutil.virtual_memory().total, *(limit.limit_bytes for limit in _limits())])


def cgroup_directories() -> list[Path]:
    """Our memory cgroup's, and those of the cgroups that contain it, ours first."""
    return [directory for directory, _ in _cgroups()]


def _limits() -> list[_Limit]:
    limits = [
        limit
        for directory, files in _cgroups()
        if (limit := _limit_of(directory, files)) is not None
    ]
    slurm = _slurm_bytes()
    # Where Slurm limits a job by a cgroup, that knows better what is used.
    if slurm is not None and all(limit.limit_bytes > slurm for limit in limits):
        limits.append(_Limit(slurm, _used_by_our_processes()))
    return limits


def _cgroups() -> Iterator[tuple[Path, _Files]]:
    """Ours, and each that contains it, as far as they are to be seen from here; cgroups(7)."""
    try:
        ours = (_PROC / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (_PROC / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in ours:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            about, _, kind = mount.partition(" - ")
            kind_name, _, options = kind.split(" ", 2)
            if controllers:
                if kind_name != "cgroup" or "memory" not in options.split(","):
                    continue
            elif kind_name != "cgroup2":
                continue
            root, point = (_unescaped(field) for field in about.split(" ")[3:5])
            for directory in _upwards(Path(point), path, root):
                yield directory, _V1 if controllers else _V2


def _upwards(mounted_at: Path, path: str, root: str) -> Iterator[Path]:
    """The directory of the cgroup `path`, and those that contain it. `root` is the one that is
    mounted: in a container it may be its own, and `path` the host's name for it.
    """
    beneath = path.removeprefix(root.rstrip("/")).strip("/") if path.startswith(root) else ""
    if ".." in Path(beneath).parts:  # outside of what we may see
        beneath = ""
    directory = mounted_at / beneath
    yield directory
    while directory != mounted_at:
        directory = directory.parent
        yield directory


def _unescaped(field: str) -> str:
    """A space or a backslash of a path is an octal number in mountinfo; proc_pid_mountinfo(5)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _limit_of(directory: Path, files: _Files) -> _Limit | None:
    limits = [_number(directory / name) for name in files.limits]
    stat = _stat(directory / "memory.stat")
    # In version 1 it tells the least limit of those above, too, which may be out of our sight.
    known = [
        limit for limit in (*limits, stat.get("hierarchical_memory_limit")) if limit is not None
    ]
    used = _number(directory / files.used)
    if not known or used is None:
        return None
    # Files that were read or written are given up before anything is killed: the kernel's own
    # MemAvailable counts so.
    return _Limit(min(known), max(0, used - sum(stat.get(name, 0) for name in files.cache)))


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _stat(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}


def _slurm_bytes() -> int | None:
    """What `--mem` and its like say: where Slurm has no cgroups, it ends a job whose processes hold
    more (sbatch(1)). 0 means all of the node's.
    """
    for name, factor in _SLURM_LIMITS:
        with suppress(KeyError, ValueError):
            mebibytes = int(os.environ[name]) * (1 if factor is None else int(os.environ[factor]))
            if mebibytes > 0:
                return mebibytes * _MIB
    return None


def _used_by_our_processes() -> int:
    """As Slurm adds them up, by their resident pages: of a keeper, the engines are part of them."""
    ours = psutil.Process()
    used = 0
    for process in (ours, *ours.children(recursive=True)):
        with suppress(psutil.Error):
            used += process.memory_info().rss
    return used
