"""How much of the node's memory this process may use: limits of cgroups and of Slurm apply.

A container, a batch job or a systemd service may have less than the machine, and the kernel kills
processes that exceed the limit. Any cgroup that contains this process may set one. The lowest limit
counts, and the smallest remainder.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MACHINE_OOM_COUNTERS = Path("/proc/vmstat")

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
    """The kernel's file names in one version of cgroups."""

    limits: Sequence[str]
    used: str
    cache: Sequence[str]
    """Entries of memory.stat."""


# https://docs.kernel.org/admin-guide/cgroup-v2.html: over `high` a cgroup is slowed down so much
# that it is useless. https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def available_bytes() -> int:
    """How much could be allocated now without swapping and within every limit."""
    return min([psutil.virtual_memory().available, *(limit.free_bytes for limit in _limits())])


def total_bytes() -> int:
    """The whole memory within every limit, used or not."""
    return min([psutil.virtual_memory().total, *(limit.limit_bytes for limit in _limits())])


def oom_kills(counters: Path = MACHINE_OOM_COUNTERS) -> int | None:
    """How many processes the kernel has killed because memory ran out, by this file of counters: a
    memory cgroup's, or the machine's since boot. None if the file does not have this number.
    """
    try:
        found = re.search(r"^oom_kill (\d+)$", counters.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def cgroup_directories() -> list[Path]:
    """The directories of this process's memory cgroup and of those that contain it, inside out."""
    return [directory for directory, _ in _cgroups()]


def _limits() -> list[_Limit]:
    limits = [
        limit
        for directory, files in _cgroups()
        if (limit := _limit_of(directory, files)) is not None
    ]
    slurm = _slurm_bytes()
    # If Slurm limits the job by a cgroup, the cgroup's count of used memory is more precise.
    if slurm is not None and all(limit.limit_bytes > slurm for limit in limits):
        limits.append(_Limit(slurm, _used_by_our_processes()))
    return limits


def _cgroups() -> Iterator[tuple[Path, _Files]]:
    """The cgroup of this process, and each visible cgroup that contains it; cgroups(7)."""
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
    """The directory of the cgroup `path`, and those that contain it. `root` is the cgroup that is
    mounted at `mounted_at`. In a container that may be the container's own, and `path` a path of
    the host.
    """
    beneath = path.removeprefix(root.rstrip("/")).strip("/") if path.startswith(root) else ""
    if ".." in Path(beneath).parts:  # outside of the mounted part
        beneath = ""
    directory = mounted_at / beneath
    yield directory
    while directory != mounted_at:
        directory = directory.parent
        yield directory


def _unescaped(field: str) -> str:
    """Mountinfo writes a space or backslash as an octal number; proc_pid_mountinfo(5)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _limit_of(directory: Path, files: _Files) -> _Limit | None:
    limits = [_number(directory / name) for name in files.limits]
    stat = _stat(directory / "memory.stat")
    # In version 1 it has the lowest limit of the cgroups above too, which may not be visible.
    known = [
        limit for limit in (*limits, stat.get("hierarchical_memory_limit")) if limit is not None
    ]
    used = _number(directory / files.used)
    if not known or used is None:
        return None
    # The page cache of files is freed before any process is killed, so it counts as available, as
    # in the kernel's MemAvailable.
    return _Limit(min(known), max(0, used - sum(stat.get(name, 0) for name in files.cache)))


def _number(path: Path) -> int | None:
    """None if there is no such file, or if it contains `max`."""
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
    """The job's limit by `--mem` and similar options: without cgroups, Slurm ends a job whose
    processes hold more (sbatch(1)). 0 means the whole node's memory.
    """
    for name, factor in _SLURM_LIMITS:
        with suppress(KeyError, ValueError):
            mebibytes = int(os.environ[name]) * (1 if factor is None else int(os.environ[factor]))
            if mebibytes > 0:
                return mebibytes * _MIB
    return None


def _used_by_our_processes() -> int:
    """The resident memory of this process and its descendants, as Slurm counts it. A keeper's
    engines are among them.
    """
    ours = psutil.Process()
    used = 0
    for process in (ours, *ours.children(recursive=True)):
        with suppress(psutil.Error):
            used += process.memory_info().rss
    return used
