"""The checks of the machine."""

import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from services.contracts import Settings, load_settings
from services.contracts.errors import EngineStartError, UsageError
from services.doctor import node_checks
from services.node.device import Device


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(runtime_dir=tmp_path / "run", cache_dir=tmp_path / "cache")


@pytest.fixture
def interpreter(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an interpreter that runs a line of shell instead of the code that it is given."""

    def make(line: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("echo 'ImportError: libcudart' >&2; exit 1", "ImportError: libcudart"),
        ("exit 3", "exit code 3"),
    ],
)
def test_an_interpreter_without_vllm_is_an_error(
    settings: Settings, interpreter: Callable[[str], Path], line: str, part: str
) -> None:
    with pytest.raises(EngineStartError, match=part):
        node_checks.engine(settings.model_copy(update={"engine_python": interpreter(line)}))


def test_an_engine_that_does_not_match_the_node_is_a_warning(
    settings: Settings, interpreter: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    python = interpreter("""echo noise; echo '{"vllm": "0.32.0", "cuda": "13.0"}'""")
    found = node_checks.engine(settings.model_copy(update={"engine_python": python}))
    assert found.level == "warning"
    assert "CUDA 13.0, which does not match this node" in found.message


@pytest.mark.parametrize(
    ("driver", "level", "part"),
    [
        (13_000, "ok", "the driver supports CUDA 13.0"),
        (13_010, "ok", "the driver supports CUDA 13.1"),
        (14_000, "ok", "the driver supports CUDA 14.0"),
        (12_090, None, "CUDA 12.9, which is too old for this engine"),
        (None, "ok", "built for CUDA 13.0"),
    ],
)
def test_the_driver_is_compared_with_the_cuda_that_the_engine_was_built_for(
    settings: Settings,
    interpreter: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    driver: int | None,
    level: str | None,
    part: str,
) -> None:
    def version() -> int:
        if driver is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return driver

    gpu = Device("cuda", "NVIDIA H100", 80 * 1024**3, (0,), "0")
    monkeypatch.setattr("services.node.device.find_device", lambda: gpu)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", version)
    python = interpreter("""echo '{"vllm": "0.32.0", "cuda": "13.0"}'""")
    here = settings.model_copy(update={"engine_python": python})
    if level is None:
        with pytest.raises(EngineStartError, match=part):
            node_checks.engine(here)
        return
    found = node_checks.engine(here)
    assert found.level == level and part in found.message


def test_an_older_driver_of_the_same_major_version_is_a_warning() -> None:
    assert node_checks._compare_cuda("vLLM", (13, 2), (13, 0)).level == "warning"


def test_directories_on_a_network_file_system_are_not_for_sockets_and_slow_for_caches(
    settings: Settings, mounted: Callable[[Path, str], None], tmp_path: Path
) -> None:
    mounted(tmp_path, "nfs4")
    with pytest.raises(UsageError, match="on nfs4, but its sockets and locks belong to one node"):
        node_checks.runtime_dir(settings)
    found = node_checks.caches(settings)
    assert found.level == "warning"
    assert "on nfs4; a directory on a local disk is faster" in found.message


def limit(monkeypatch: pytest.MonkeyPatch, **soft: int) -> None:
    """Set these limits; all others are unlimited."""
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
def test_limits_of_threads_and_address_space_are_warnings(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    soft: int,
    advice: str | None,
) -> None:
    limit(monkeypatch, RLIMIT_NOFILE=65_536, **{name: soft})
    found = node_checks.limits(settings)
    assert found.level == ("warning" if advice else "ok")
    assert advice is None or advice in found.message


@pytest.mark.parametrize("files", [1_024, 65_536])
def test_few_open_files_are_a_warning(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    limit(monkeypatch, RLIMIT_NOFILE=files)
    found = node_checks.limits(settings)
    assert (found.level == "warning") == ("ulimit -n 4096" in found.message) == (files < 4_096)


def test_too_few_open_files_are_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, RLIMIT_NOFILE=64)
    with pytest.raises(UsageError, match="ulimit -n 4096"):
        node_checks.limits(settings)


@pytest.mark.parametrize(("state", "level"), [(0, "ok"), (5, "warning")])
def test_a_clock_that_is_not_synchronised_is_a_warning(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, state: int, level: str
) -> None:
    class Library:
        def adjtimex(self, _: object) -> int:
            return state

    monkeypatch.setattr(node_checks.ctypes, "CDLL", lambda _: Library())
    assert node_checks.clock(settings).level == level
