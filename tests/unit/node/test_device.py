import os
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest

from services.contexts.engine_command import fork_server_environment
from services.contexts.plan import EnginePlan
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineStartError
from services.node.device import find_device, visible_gpus


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


WHOLE = [
    *("GPU-ddc1c098-0b1c-4d9a-9d0a-1f6a3e0c8a55", "GPU-8a1b0000-0b1c-4d9a-9d0a-1f6a3e0c8a55"),
    *("GPU-8a1bffff-0b1c-4d9a-9d0a-1f6a3e0c8a55", "MIG-77e3d2c1-5f0a-5b44-8f2f-3a1c9e7d6b50"),
]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs, of which the last is divided; NVML takes whole names alone."""
    found = SimpleNamespace(free=2**34)

    def by_uuid(uuid: str) -> str:
        if uuid not in WHOLE:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def instance(handle: str, index: int) -> str:
        if (handle, index) != (WHOLE[2], 1):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return WHOLE[3]

    for name, does in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: WHOLE[index],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetMaxMigDeviceCount": lambda _: 2,
        "nvmlDeviceGetMigDeviceHandleByIndex": instance,
        "nvmlDeviceGetName": lambda handle: f"the one called {handle}",
        "nvmlDeviceGetMemoryInfo": lambda _: found,
    }.items():
        monkeypatch.setattr(pynvml, name, does)


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [
        ("GPU-ddc1c098", WHOLE[:1]),
        (f"{WHOLE[1]},GPU-8a1bf", WHOLE[1:3]),
        ("MIG-77e3", WHOLE[3:]),
        ("GPU-8a1b,GPU-none", ["GPU-8a1b", "GPU-none"]),  # of two GPUs, and of none
        ("1", WHOLE[1:2]),
        ("0,2,GPU-8a1b0", [*WHOLE[0:3:2], WHOLE[1]]),
        ("7", ["7"]),
    ],
)
def test_a_gpu_by_its_index_or_the_beginning_of_its_uuid_is_the_one_that_cuda_would_take(
    variable: str, gpus: list[str], several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == gpus


def test_an_engine_gets_names_of_gpus_that_it_accepts(
    several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ddc1c098,GPU-8a1bf")  # as HTCondor does
    device = find_device()
    assert (device.gpu, device.name) == (WHOLE[0], f"the one called {WHOLE[0]}")
    plan = EnginePlan.of(ContextSpec(model="org/model"), device, load_settings())
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == f"{WHOLE[0]},{WHOLE[2]}"


def test_a_gpu_has_one_name_whatever_the_variable_calls_it(
    several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for variable in ("1", WHOLE[1], "GPU-8a1b0", "1,junk"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        device = find_device()
        assert device.gpu == WHOLE[1]
        names.add(EnginePlan.of(ContextSpec(model="org/model"), device, load_settings()).name)
    assert len(names) == 1  # so they share an engine
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert find_device().gpu == WHOLE[0] and visible_gpus() == WHOLE[:3]


def test_gpus_have_the_same_order_for_an_engine_as_for_us(
    several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    plan = EnginePlan.of(ContextSpec(model="org/model"), find_device(), load_settings())
    assert plan.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert fork_server_environment(plan)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def no_driver() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def test_without_the_variable_and_without_a_driver_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert visible_gpus() == []
    assert find_device().kind == "cpu"


def test_a_driver_that_is_not_loaded_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", failing(pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    assert find_device().kind == "cpu"


def failing(code: int) -> Callable[[], None]:
    def init() -> None:
        raise pynvml.NVMLError(code)

    return init


@pytest.mark.parametrize("named", [None, "0"])
def test_a_driver_that_was_updated_while_in_use_is_reported_with_the_remedy(
    named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    mismatch = failing(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    monkeypatch.setattr(pynvml, "nvmlInit", mismatch)
    with pytest.raises(EngineStartError) as failed:
        find_device()
    message = str(failed.value)
    assert "is there and does not answer (RM has detected an NVML/RM version mismatch" in message
    assert "restart the node" in message and "set CUDA_VISIBLE_DEVICES to nothing" in message


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_TIMEOUT]
)
def test_a_driver_that_does_not_answer_is_no_reason_to_use_the_processors_without_a_word(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", failing(code))
    with pytest.raises(EngineStartError, match="does not answer .* see what `nvidia-smi` says"):
        find_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device().kind == "cpu"


@pytest.mark.parametrize("hidden", ["-1", "NoDevFiles"])
def test_the_usual_ways_to_hide_every_gpu_leave_the_processors(
    hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA itself takes -1 for "none"; Slurm sets NoDevFiles in a job that asked for no GPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert find_device().kind == "cpu"


def test_a_gpu_that_is_named_but_not_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    with pytest.raises(EngineStartError, match="no GPU '0' here .*correct CUDA_VISIBLE_DEVICES"):
        find_device()
