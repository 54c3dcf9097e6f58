"""`keepwarm doctor`: what it says of a machine, and the exit code. Of a broker: see the integration
tests.
"""

import json
import resource
import sqlite3
import stat
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pynvml
import pytest

from services.cli import doctor
from services.contracts import Settings, load_settings
from services.contracts.errors import EngineStartError
from services.doctor import node_checks
from services.doctor.findings import note, shared_file_system, well
from services.node.device import Device
from services.store import Store

Keepwarm = Callable[..., int]
Partition = namedtuple("Partition", "mountpoint fstype")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(
        runtime_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        store_url=str(tmp_path / "store.sqlite"),
    )


@pytest.fixture
def vllm_for(tmp_path: Path) -> Callable[[str], Path]:
    """An interpreter that says this instead of what it is asked for."""

    def interpreter(says: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{says}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return interpreter


def on(monkeypatch: pytest.MonkeyPatch, place: Path, kind: str) -> None:
    mounts = [Partition("/", "ext4"), Partition(str(place), kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name]})


def test_a_machine_is_told_line_by_line(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", sys.executable)
    monkeypatch.setattr(node_checks, "_ASK_ENGINE", 'print(\'{"vllm": "1.2", "cuda": null}\')')
    assert keepwarm("doctor") == 0
    output = capsys.readouterr().out
    for name in doctor.CHECKS:
        assert name in output
    assert "vLLM 1.2" in output


def test_json_is_one_object_a_line(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "python")
    assert keepwarm("doctor", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["check"], found["level"]) == ("python", "well")
    assert found["says"].startswith("Python 3")


def test_the_exit_code_is_that_of_the_first_fault_and_the_rest_is_looked_at_all_the_same(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", "/tmp/" + "long" * 30)
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", "/bin/false")
    assert keepwarm("doctor") == 2
    output = capsys.readouterr().out
    assert "name a shorter directory" in output
    assert "/bin/false does not import vLLM: exit code 1" in output
    assert "store" in output
    Path("/tmp/" + "long" * 30).rmdir()


def test_what_is_not_installed_is_not_looked_at(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "store")
    monkeypatch.setitem(sys.modules, "services.store.database", None)
    assert keepwarm("doctor") == 0
    assert "not looked at: services.store.database is not installed here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("says", "part"),
    [
        ("echo 'ImportError: libcudart' >&2; exit 1", "ImportError: libcudart"),
        ("exit 3", "exit code 3"),
    ],
)
def test_an_interpreter_without_vllm_is_a_fault(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    vllm_for: Callable[[str], Path],
    says: str,
    part: str,
) -> None:
    only(monkeypatch, "engine")
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", str(vllm_for(says)))
    assert keepwarm("doctor") == 4
    assert part in capsys.readouterr().out


def test_an_engine_built_for_what_the_node_has_not_is_noted(
    settings: Settings, vllm_for: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    python = vllm_for("""echo noise; echo '{"vllm": "0.32.0", "cuda": "13.0"}'""")
    found = node_checks.engine(settings.model_copy(update={"engine_python": python}))
    assert found.level == "note"
    assert "CUDA 13.0, which is not what this node has" in found.says


@pytest.mark.parametrize(
    ("driver", "level", "part"),
    [
        (13_000, "well", "the driver knows CUDA 13.0"),
        (13_010, "well", "the driver knows CUDA 13.1"),
        (14_000, "well", "the driver knows CUDA 14.0"),
        (12_090, None, "CUDA 12.9, which is too old for this engine"),
        (None, "well", "built for CUDA 13.0"),
    ],
)
def test_the_driver_is_judged_by_what_the_engine_was_built_for(
    settings: Settings,
    vllm_for: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    driver: int | None,
    level: str | None,
    part: str,
) -> None:
    def told() -> int:
        if driver is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return driver

    gpu = Device("cuda", "NVIDIA H100", 80 * 1024**3, (0,), "0")
    monkeypatch.setattr("services.node.device.find_device", lambda: gpu)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", told)
    python = vllm_for("""echo '{"vllm": "0.32.0", "cuda": "13.0"}'""")
    here = settings.model_copy(update={"engine_python": python})
    if level is None:
        with pytest.raises(EngineStartError, match=part):
            node_checks.engine(here)
        return
    found = node_checks.engine(here)
    assert found.level == level and part in found.says


def test_an_older_driver_of_the_same_major_version_is_noted() -> None:
    assert node_checks._judged("vLLM", (13, 2), (13, 0)).level == "note"


def test_directories_that_other_nodes_see_are_not_for_sockets_nor_for_sqlite(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    on(monkeypatch, tmp_path, "nfs4")
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", "/bin/false")
    monkeypatch.setenv("KEEPWARM_CACHE_DIR", str(tmp_path / "cache"))
    assert keepwarm("doctor", "--store", str(tmp_path / "store.sqlite")) == 2
    output = capsys.readouterr().out
    assert "on nfs4, and its sockets and locks belong to one node" in output
    assert "on nfs4, where SQLite can lose what it wrote" in output
    assert "on nfs4; a directory on the node's own disk is faster" in output


def test_the_innermost_mount_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch, tmp_path, "lustre")
    assert shared_file_system(tmp_path / "a" / "b") == "lustre"
    assert shared_file_system(tmp_path.parent) is None


def limit(monkeypatch: pytest.MonkeyPatch, **soft: int) -> None:
    """These limits, and no others."""
    limits = {getattr(resource, name): value for name, value in soft.items()}
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (limits.get(which, unlimited), unlimited)
    )


@pytest.mark.parametrize(
    ("name", "soft", "advice"),
    [
        ("RLIMIT_NPROC", 1_024, "ulimit -u 4096"),
        ("RLIMIT_NPROC", 4_096, None),
        ("RLIMIT_AS", 64 * 1024**3, "ulimit -v unlimited"),
        ("RLIMIT_AS", resource.RLIM_INFINITY, None),
    ],
)
def test_limits_of_threads_and_of_addresses_are_noted(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    soft: int,
    advice: str | None,
) -> None:
    limit(monkeypatch, RLIMIT_NOFILE=65_536, **{name: soft})
    found = node_checks.limits(settings)
    assert found.level == ("note" if advice else "well")
    assert advice is None or advice in found.says


@pytest.mark.parametrize(("soft", "expected"), [(64, 2), (1_024, 0), (65_536, 0)])
def test_few_files_are_noted_and_too_few_are_a_fault(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    expected: int,
) -> None:
    only(monkeypatch, "limits")
    limit(monkeypatch, RLIMIT_NOFILE=soft)
    assert keepwarm("doctor") == expected
    assert ("ulimit -n 4096" in capsys.readouterr().out) == (soft < 4_096)


@pytest.mark.parametrize(("state", "level"), [(0, "well"), (5, "note")])
def test_a_clock_that_nothing_holds_is_noted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, state: int, level: str
) -> None:
    class Library:
        def adjtimex(self, _: object) -> int:
            return state

    monkeypatch.setattr(node_checks.ctypes, "CDLL", lambda _: Library())
    assert node_checks.clock(settings).level == level


def test_a_store_that_is_there_is_opened(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    only(monkeypatch, "store")
    file = tmp_path / "store.sqlite"
    assert keepwarm("doctor", "--store", str(file)) == 0
    assert "not there yet" in capsys.readouterr().out
    assert not file.exists()
    Store.open(load_settings(store_url=str(file))).close()
    assert keepwarm("doctor", "--store", str(file)) == 0
    assert "not there yet" not in capsys.readouterr().out
    file.write_bytes(b"not a database, whatever its name is" * 100)
    assert keepwarm("doctor", "--store", str(file)) == 6


def contents(file: Path) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]], str]:
    """Its tables and indexes, its versions, and its journal mode."""
    with closing(sqlite3.connect(file)) as database:
        return (
            database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall(),
            database.execute("SELECT version FROM keepwarm_schema").fetchall(),
            database.execute("PRAGMA journal_mode").fetchone()[0],
        )


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_store_of_an_older_version_stays_as_it_is(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stored: Path,
    mode: str,
) -> None:
    only(monkeypatch, "store")
    with closing(sqlite3.connect(stored)) as database, database:
        database.execute(f"PRAGMA journal_mode = {mode}")
        database.execute("DROP TABLE verdict_counts")
        database.execute("DROP INDEX outcomes_dead")
        database.execute("UPDATE keepwarm_schema SET version = 3")
    before = contents(stored)
    assert keepwarm("doctor", "--store", str(stored)) == 0
    output = capsys.readouterr().out
    assert "note" in output and "version 3, would be upgraded by the next collector" in output
    assert contents(stored) == before
    assert before[1:] == ([(3,)], mode)


def test_a_store_that_cannot_be_written_is_a_fault(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stored: Path,
) -> None:
    """Read it still can be."""
    only(monkeypatch, "store")
    with closing(sqlite3.connect(stored)) as database, database:
        refuse = "BEGIN SELECT RAISE(ABORT, 'no more of it'); END"
        database.execute(f"CREATE TRIGGER no BEFORE INSERT ON keepwarm_schema {refuse}")
    assert keepwarm("doctor", "--store", str(stored)) == 6
    assert "no more of it" in capsys.readouterr().out


def test_an_empty_file_stays_empty(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    only(monkeypatch, "store")
    file = tmp_path / "store.sqlite"
    file.touch()
    assert keepwarm("doctor", "--store", str(file)) == 0
    assert "empty, the collector makes its tables" in capsys.readouterr().out
    assert file.stat().st_size == 0 and list(tmp_path.glob("store.sqlite?*")) == []


def test_a_store_of_a_newer_version_is_a_fault(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stored: Path,
) -> None:
    only(monkeypatch, "store")
    with closing(sqlite3.connect(stored)) as database, database:
        database.execute("UPDATE keepwarm_schema SET version = 99")
    assert keepwarm("doctor", "--store", str(stored)) == 6
    assert "has schema version 99" in capsys.readouterr().out


def test_a_store_in_a_directory_that_we_may_not_write_is_a_fault(
    keepwarm: Keepwarm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    open_dir: Path,
    unprivileged: Callable[..., object],
) -> None:
    only(monkeypatch, "store")
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", "/bin/false")
    with unprivileged():
        assert keepwarm("doctor", "--store", str(open_dir / "store.sqlite")) == 6
    assert "SQLite writes files beside" in capsys.readouterr().out


def test_findings_are_values() -> None:
    assert (well("a").level, note("b").level) == ("well", "note")
