"""The least of all limits on memory counts: on made-up trees of cgroups, and on a real one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from services.contexts.engine_command import engine_environment, free_bytes, total_bytes
from services.contexts.plan import EnginePlan
from services.contracts import ContextSpec, load_settings
from services.node import memory
from services.node.device import find_device

GIB = 1024**3
UNLIMITED_V1 = 9223372036854771712


class Tree:
    """A machine of 64 GiB, 48 of them free, with cgroups as a test wants them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        (directory / "proc").mkdir()
        machine = SimpleNamespace(total=64 * GIB, available=48 * GIB)
        monkeypatch.setattr(memory, "_PROC", directory / "proc")
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
        for name in list(os.environ):
            if name.startswith("SLURM"):
                monkeypatch.delenv(name)
        self.is_in("0::/")

    def is_in(self, *cgroups: str, mounts: str = "") -> None:
        """Lines of /proc/self/cgroup, and of /proc/self/mountinfo."""
        (self._directory / "proc" / "cgroup").write_text("".join(f"{line}\n" for line in cgroups))
        v2, v1 = self._directory / "v2", self._directory / "a v1"
        (self._directory / "proc" / "mountinfo").write_text(
            mounts
            or "31 23 0:28 / /sys rw,relatime - sysfs sysfs rw\n"
            f"41 31 0:38 / {v2} rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
            f"32 31 0:29 / {self._directory}/cpu rw - cgroup cgroup rw,cpu\n"
            f"35 31 0:32 / {str(v1).replace(' ', chr(92) + '040')} rw - cgroup cgroup rw,memory\n"
        )

    def v2(
        self, path: str, *, limit: str, used: int = 0, cache: int = 0, high: str = "max"
    ) -> None:
        here = self._directory / "v2" / path
        here.mkdir(parents=True, exist_ok=True)
        (here / "memory.max").write_text(f"{limit}\n")
        (here / "memory.high").write_text(f"{high}\n")
        (here / "memory.current").write_text(f"{used}\n")
        stat = f"anon 7\ninactive_file {cache}\nactive_file 0\n"
        (here / "memory.stat").write_text(stat)

    def v1(self, path: str, *, limit: int, used: int = 0, cache: int = 0, above: int = 0) -> None:
        here = self._directory / "a v1" / path
        here.mkdir(parents=True, exist_ok=True)
        (here / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (here / "memory.usage_in_bytes").write_text(f"{used}\n")
        (here / "memory.stat").write_text(
            f"hierarchical_memory_limit {above or limit}\ninactive_file 999999999999\n"
            f"total_inactive_file 0\ntotal_active_file {cache}\n"
        )


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


def seen() -> tuple[float, float]:
    """GiB in all, and free."""
    return memory.total_bytes() / GIB, memory.available_bytes() / GIB


def test_without_a_limit_it_is_the_machines(tree: Tree) -> None:
    assert seen() == (64, 48)
    tree.is_in("0::/user.slice/session-1.scope", "4:memory:/user")
    tree.v2("user.slice/session-1.scope", limit="max")
    tree.v1("user", limit=UNLIMITED_V1)
    assert seen() == (64, 48)


def test_of_nested_limits_the_least_counts_and_the_least_that_is_left(tree: Tree) -> None:
    tree.is_in("0::/system.slice/slurmd/job_7/step_0")
    tree.v2("system.slice/slurmd/job_7/step_0", limit="max")
    tree.v2("system.slice/slurmd/job_7", limit=str(4 * GIB), used=1 * GIB)
    tree.v2("system.slice", limit=str(32 * GIB), used=30 * GIB)
    assert seen() == (4, 2)


def test_files_that_the_kernel_would_give_up_count_as_free(tree: Tree) -> None:
    tree.is_in("0::/job")
    tree.v2("job", limit=str(8 * GIB), used=7 * GIB, cache=5 * GIB)
    assert seen() == (8, 6)


def test_over_the_high_mark_nothing_is_of_use(tree: Tree) -> None:
    tree.is_in("0::/job")
    tree.v2("job", limit=str(8 * GIB), high=str(3 * GIB), used=4 * GIB)
    assert seen() == (3, 0)


def test_version_1_is_understood_with_what_cannot_be_seen_of_it(tree: Tree) -> None:
    tree.is_in("5:devices:/", "4:cpu,memory:/slurm/uid_0/job_7", "0::/")
    tree.v1("slurm/uid_0/job_7", limit=UNLIMITED_V1, used=2 * GIB, cache=1 * GIB, above=6 * GIB)
    assert seen() == (6, 5)


def test_a_container_sees_its_own_limit_where_its_cgroups_are_mounted(
    tree: Tree, tmp_path: Path
) -> None:
    tree.v1("", limit=3 * GIB, used=1 * GIB)
    point = str(tmp_path / "a v1").replace(" ", "\\040")
    for root, path in (
        ("/docker/0123", "/docker/0123"),  # the host's name for it
        ("/", "/docker/0123"),  # of which nothing is there
        ("/docker/0123", "/docker/4567"),
        ("/", "/../outside"),
    ):
        tree.is_in(f"4:memory:{path}", mounts=f"35 31 0:32 {root} {point} ro - cgroup x memory\n")
        assert seen() == (3, 2)


@pytest.mark.parametrize(
    ("variables", "gib"),
    [
        ({"SLURM_MEM_PER_NODE": "3072"}, 3),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4"}, 4),
        ({"SLURM_MEM_PER_GPU": "5120", "SLURM_GPUS_ON_NODE": "1"}, 5),
        ({"SLURM_MEM_PER_NODE": "0"}, 64),  # all of it
        ({"SLURM_MEM_PER_CPU": "1024"}, 64),
        ({"SLURM_MEM_PER_NODE": "plenty"}, 64),
    ],
)
def test_slurms_limit_counts_where_no_cgroup_has_it(
    variables: dict[str, str], gib: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    total, free = seen()
    assert total == gib
    if gib < 64:  # what our processes hold is taken from it
        assert gib - 2 < free < gib
        tree.is_in("0::/job")
        tree.v2("job", limit=str(gib * GIB), used=GIB)
        assert seen() == (gib, gib - 1)


def test_an_engine_on_processors_is_made_for_what_its_job_may_have(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tree.is_in("0::/job")
    for limit, cache in ((24, "2"), (3, "1")):
        tree.v2("job", limit=str(limit * GIB), used=GIB)
        device = find_device()
        assert (total_bytes(device), free_bytes(device)) == (limit * GIB, (limit - 1) * GIB)
        plan = EnginePlan.of(ContextSpec(model="/m"), device, load_settings())
        assert engine_environment(plan, Path("/c"))["VLLM_CPU_KVCACHE_SPACE"] == cache


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """One of this machine's, with a limit of 1 GiB."""
    name = f"keepwarm-test-{os.getpid()}"
    limits = ("memory.max", "memory.limit_in_bytes")
    try:
        where = next(
            directory / name
            for directory, files in memory._cgroups()
            if any((directory / limit).exists() for limit in limits)
        )
        where.mkdir()
    except (StopIteration, OSError):
        pytest.skip("no cgroup can be made here")
    try:
        try:
            limit = next(file for file in limits if (where / file).exists())
            (where / limit).write_text(str(GIB))
        except (StopIteration, OSError):
            pytest.skip("no cgroup here can limit memory")
        yield where
    finally:
        where.rmdir()


def test_a_real_limit_is_seen_from_within(real_cgroup: Path, repository: Path) -> None:
    code = (
        "from services.node.memory import available_bytes, total_bytes\n"
        "held = bytearray(300 * 1024**2)\n"
        "print(total_bytes(), available_bytes())"
    )
    done = subprocess.run(
        [
            *("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(real_cgroup)),
            *(sys.executable, "-c", code),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    total, free = map(int, done.stdout.split())
    assert total == GIB < psutil.virtual_memory().total
    assert 0 < free < GIB - 300 * 1024**2


def test_the_kernels_count_of_killed_processes_is_read(tmp_path: Path) -> None:
    assert (memory.oom_kills() or 0) >= 0
    events = tmp_path / "memory.events"
    assert memory.oom_kills(events) is None
    events.write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
    assert memory.oom_kills(events) == 2
