import os

import pynvml
import pytest

from services.contexts import find_device, visible_gpus
from services.contracts.errors import EngineStartError


def test_without_a_visible_gpu_the_processors_are_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device = find_device()
    assert device.kind == "cpu"
    assert device.name
    assert set(device.cores) == os.sched_getaffinity(0)
    assert device.memory_bytes > 0


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [
        ("", []),
        ("0", ["0"]),
        ("2,3", ["2", "3"]),
        (" 1 , 0 ", ["1", "0"]),
        ("GPU-8a1b,MIG-77", ["GPU-8a1b", "MIG-77"]),
    ],
)
def test_the_variable_says_which_gpus_are_visible(
    variable: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == gpus


def no_driver() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def test_without_the_variable_and_without_a_driver_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert visible_gpus() == []
    assert find_device().kind == "cpu"


@pytest.mark.parametrize("hidden", ["-1", "NoDevFiles"])
def test_the_usual_ways_to_hide_every_gpu_leave_the_processors(
    hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA itself takes -1 for "none"; Slurm sets NoDevFiles in a job that asked for no GPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert find_device().kind == "cpu"


def test_a_gpu_that_is_named_but_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    with pytest.raises(EngineStartError, match="no GPU '0' here .*correct CUDA_VISIBLE_DEVICES"):
        find_device()
