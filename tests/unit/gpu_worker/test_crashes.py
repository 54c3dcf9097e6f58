"""The records of a dead worker, and what counts as evidence of a crash."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from services.gpu_worker import crashes as module
from services.gpu_worker.crashes import Crash, CrashRecords
from services.node import runtime_dir
from tests.conftest import REPOSITORY
from tests.unit.gpu_worker.conftest import died_asking

KEY, OTHER = ("run-1", "c1"), ("run-1", "c2")

DIES = """
import ctypes, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from services.gpu_worker.crashes import CrashRecords
crashes = CrashRecords(Path(sys.argv[2]), f"worker-{os.getpid()}")
crashes.catch_fatal_signals()
with crashes.recorded([("run-1", "c1")], alone=sys.argv[4] == "alone"):
    exec(sys.argv[3])
"""
SEGFAULT = "ctypes.string_at(0)"
ABORT = "os.abort()"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A runtime directory."""
    directory = tmp_path / "node"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def worker(node: Path) -> Iterator[Callable[[str], CrashRecords]]:
    """Start a worker of this node, in this process."""
    started: list[CrashRecords] = []

    def start(name: str) -> CrashRecords:
        started.append(CrashRecords(node, name))
        return started[-1]

    yield start
    for one in started:
        one.close()


def dies(node: Path, how: str, *, alone: bool = False) -> int:
    """A worker's process, asking about a claim, ends in this way. Its exit code."""
    return subprocess.run(
        [sys.executable, "-c", DIES, str(REPOSITORY), str(node), how, "alone" if alone else ""],
        check=False,
        capture_output=True,
    ).returncode


@pytest.mark.parametrize(
    ("how", "number", "signal_name"),
    [(SEGFAULT, signal.SIGSEGV, "Segmentation fault"), (ABORT, signal.SIGABRT, "Aborted")],
)
def test_a_worker_that_dies_of_a_fatal_signal_leaves_the_claims_and_a_traceback(
    how: str, number: int, signal_name: str, node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    assert dies(node, how) == -number
    crash = worker("next").get(KEY)
    assert crash is not None and (crash.alone, crash.memory) == (0, False)
    assert f"Fatal Python error: {signal_name}" in crash.evidence
    assert worker("third").get(KEY) == crash  # for every worker of the node
    assert not any("worker-" in path.name for path in (node / "workers").iterdir())


MANY_THREADS = """
import threading
for _ in range(200):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
crashes.abort("the tokenizer hangs")
"""


def test_the_evidence_of_a_worker_with_many_threads_begins_with_what_happened(
    node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    assert dies(node, MANY_THREADS, alone=True) == -signal.SIGABRT
    crash = worker("next").get(KEY)
    assert crash is not None and crash.alone == 1
    assert crash.evidence.startswith("the tokenizer hangs\nFatal Python error: Aborted")
    assert len(crash.evidence) < 8_100


def test_a_hundred_workers_that_are_killed_from_outside_quarantine_no_claim(
    node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    for _ in range(3):
        assert dies(node, KILLED, alone=True) == -signal.SIGKILL
    for number in range(97):  # the same on disk, without the time that a process takes
        died_asking(node, f"killed-{number}", [KEY], alone=True)
    following = worker("next")
    assert not following.any and following.get(KEY) is None
    assert [path.name for path in (node / "workers").iterdir()] == ["next"]


def test_crashes_alone_are_counted_and_crashes_with_other_claims_are_not(
    node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    for alone in (False, True, True):
        dies(node, SEGFAULT, alone=alone)
    crash = worker("next").get(KEY)
    assert crash is not None and crash.alone == 2


def test_a_dead_worker_that_another_worker_collects_meanwhile_hides_no_other_crash(
    node: Path, worker: Callable[[str], CrashRecords], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = worker("waiting")
    dies(node, SEGFAULT)
    worker("other")  # collects the crash
    died_asking(node, "gone", [OTHER])

    def take_lock(path: Path) -> int | None:
        if path.parent.name == "gone":
            shutil.rmtree(path.parent)
        return runtime_dir.take_lock(path)

    monkeypatch.setattr(module, "take_lock", take_lock)
    waiting.collect()
    assert waiting.get(KEY) is not None


def test_a_claim_that_has_an_outcome_is_forgotten(
    node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    dies(node, SEGFAULT)
    following = worker("next")
    following.forget([KEY, OTHER])
    assert following.get(KEY) is None
    assert not worker("third").any


def test_a_worker_that_lives_or_ended_in_order_leaves_nothing(
    node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    living, ending = worker("living"), worker("ending")
    with living.recorded([KEY]), ending.recorded([KEY]):
        ending.close()
        other = worker("other")
        assert not other.any
        assert {path.name for path in (node / "workers").iterdir()} == {"living", "other"}


def test_a_worker_that_died_meanwhile_is_found_by_the_next_collect(
    node: Path, worker: Callable[[str], CrashRecords]
) -> None:
    following = worker("next")
    dies(node, SEGFAULT)
    assert following.get(KEY) is None
    following.collect()
    assert following.get(KEY) is not None


def test_what_is_old_is_forgotten(node: Path, worker: Callable[[str], CrashRecords]) -> None:
    dies(node, SEGFAULT)
    worker("next")
    for path in (node / "crashed").iterdir():
        os.utime(path, (0, 0))
    assert not worker("third").any


def test_a_record_that_cannot_be_written_or_read_harms_nobody(
    node: Path, worker: Callable[[str], CrashRecords], monkeypatch: pytest.MonkeyPatch
) -> None:
    following = worker("next")

    def full(*_: object, **__: object) -> int:
        raise OSError("No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        with following.recorded([KEY]):
            pass
    dies(node, SEGFAULT)
    following.collect()
    for path in (node / "crashed").iterdir():
        path.write_text("{")
    assert following.get(KEY) is None


# Killed because memory ran out.


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, int], None]:
    """What the kernel counts as killed: in the worker's cgroup, None once that is gone; and on the
    machine.
    """
    cgroup, machine = tmp_path / "memory.events", tmp_path / "vmstat"

    def counts(in_cgroup: int | None, on_machine: int) -> None:
        machine.write_text(f"pgfault 7\noom_kill {on_machine}\n")
        if in_cgroup is None:
            cgroup.unlink(missing_ok=True)
        else:
            cgroup.write_text(f"oom 3\noom_kill {in_cgroup}\noom_group_kill 0\n")

    counts(0, 4)
    monkeypatch.setattr(module, "_cgroup_counters", lambda: [cgroup])
    monkeypatch.setattr(module, "MACHINE_OOM_COUNTERS", machine)
    return counts


@pytest.mark.parametrize(
    ("in_cgroup", "on_machine", "counts"),
    [
        (0, 4, False),  # a preemption
        (0, 9, False),  # a preemption, while memory ran out elsewhere on the machine
        (1, 5, True),
        (None, 4, False),  # the cgroup went with the job, and nobody was killed for memory
        (None, 5, True),
    ],
)
def test_a_kill_counts_if_the_kernels_count_of_memory_kills_grew(
    in_cgroup: int | None,
    on_machine: int,
    counts: bool,
    node: Path,
    worker: Callable[[str], CrashRecords],
    kernel: Callable[[int | None, int], None],
) -> None:
    died_asking(node, "dead", [KEY], alone=True)
    kernel(in_cgroup, on_machine)
    crash = worker("next").get(KEY)
    why = "the kernel killed it (SIGKILL) because memory ran out"
    assert crash == (Crash(1, why, memory=True) if counts else None)


def test_an_earlier_shortage_of_memory_is_no_evidence_of_a_later_death(
    node: Path,
    worker: Callable[[str], CrashRecords],
    kernel: Callable[[int | None, int], None],
) -> None:
    kernel(1, 5)
    died_asking(node, "dead", [KEY], alone=True)
    assert not worker("next").any


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB, of version 1 or 2, where we may make one."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = root / f"keepwarm-crashes-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            try:
                for name in ("memory.limit_in_bytes", "memory.max"):
                    if (group / name).exists():
                        (group / name).write_text(str(64 * 1024**2))
                        yield group
                        return
            finally:
                group.rmdir()
    pytest.skip("this user may make no memory cgroup")


HUNGRY = """
Path(sys.argv[5], "cgroup.procs").write_text(str(os.getpid()))
with crashes.recorded([("run-1", "c1")], alone=True):
    hoard = [bytearray(1024**2) for _ in range(1024)]
"""


def test_a_worker_that_the_kernel_kills_for_memory_leaves_evidence(
    node: Path, worker: Callable[[str], CrashRecords], small_cgroup: Path
) -> None:
    code = DIES.partition("with crashes")[0] + HUNGRY
    arguments = ["-c", code, str(REPOSITORY), str(node), "", "", str(small_cgroup)]
    ended = subprocess.run([sys.executable, *arguments], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    crash = worker("next").get(KEY)
    assert crash is not None and crash.memory and crash.alone == 1
