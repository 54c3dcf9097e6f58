"""What this node computes on. Asked without torch or vLLM, which the worker never imports."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import psutil
import pynvml

from services.contracts.errors import EngineStartError

# Without a library or a loaded driver there is no GPU to be used; whatever else NVML says, there is
# a driver, and it does not work.
_NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_MISMATCH = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH


@dataclass(frozen=True)
class Device:
    """What an engine uses: a GPU that this process may see, or the node's processors."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    """Memory free for an engine: the GPU's, or the node's."""
    cores: tuple[int, ...]
    """The processors that this process may run on."""
    gpu: str = ""
    """The GPU as vLLM and NVML take it from CUDA_VISIBLE_DEVICES: an index or a whole UUID."""


def find_device() -> Device:
    """The first visible NVIDIA GPU, or else the processors.

    Raises EngineStartError when CUDA_VISIBLE_DEVICES names a GPU that is not there, and when there
    is a driver that does not answer.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    gpus = visible_gpus()
    if gpus:
        return _gpu(gpus[0], cores)
    return Device("cpu", _processor_name(), psutil.virtual_memory().available, cores)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: indexes or UUIDs.

    UUIDs are whole ones. HTCondor gives their beginnings, which CUDA takes, but not NVML and vLLM.
    Raises EngineStartError when none is named and there is a driver that does not answer.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        # As CUDA reads it: what follows the first name of nothing (-1, NoDevFiles) is hidden too.
        names = list(takewhile(_names_a_gpu, (name.strip() for name in named.split(","))))
        whole = [] if all(map(str.isdecimal, names)) else _uuids()
        return [_completed(name, whole) for name in names]
    try:
        with nvml():
            return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        if error.value in _NO_DRIVER:
            return []
        raise EngineStartError(_broken_driver(error)) from error


def _uuids() -> list[str]:
    """Of all GPUs here, and of what they are divided into; none without a driver."""
    found: list[str] = []
    try:
        with nvml():
            for index in range(pynvml.nvmlDeviceGetCount()):
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                found.append(str(pynvml.nvmlDeviceGetUUID(gpu)))
                found += _instances(gpu)
    except pynvml.NVMLError:
        pass
    return found


def _instances(gpu: Any) -> Iterator[str]:
    try:
        most = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except pynvml.NVMLError:
        return  # it cannot be divided
    for index in range(most):
        with suppress(pynvml.NVMLError):  # there is none of this number
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
            yield str(pynvml.nvmlDeviceGetUUID(instance))


def _completed(name: str, uuids: list[str]) -> str:
    """The UUID that begins so; the name itself where none does, or several do."""
    matching = [uuid for uuid in uuids if uuid.startswith(name)]
    return matching[0] if len(matching) == 1 else name


def _names_a_gpu(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))


def _gpu(visible: str, cores: tuple[int, ...]) -> Device:
    with gpu_handle(visible) as handle:
        return Device(
            kind="cuda",
            name=str(pynvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            cores=cores,
            gpu=visible,
        )


@contextmanager
def nvml() -> Iterator[None]:
    """NVIDIA's management library, for as long as it is asked. Raises pynvml.NVMLError."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def gpu_handle(visible: str) -> Iterator[Any]:
    """NVML's handle of a GPU. Raises EngineStartError where there is no such GPU."""
    try:
        with nvml():
            yield (
                pynvml.nvmlDeviceGetHandleByIndex(int(visible))
                if visible.isdecimal()
                # Slurm and MIG name devices by UUID.
                else pynvml.nvmlDeviceGetHandleByUUID(visible)
            )
    except pynvml.NVMLError as error:
        raise EngineStartError(_no_gpu(visible, error)) from error


def _broken_driver(error: pynvml.NVMLError) -> str:
    remedy = "see what `nvidia-smi` says, and restart the node or ask its administrator"
    if error.value == _MISMATCH:
        remedy = (
            "it was updated while the old one was in use: restart the node, or unload and load the "
            "nvidia kernel modules; in a container, restart the container"
        )
    return (
        f"the NVIDIA driver is there and does not answer ({error}): {remedy}. To use the "
        "processors instead, set CUDA_VISIBLE_DEVICES to nothing"
    )


def _no_gpu(visible: str, error: pynvml.NVMLError) -> str:
    if error.value == _MISMATCH:
        return _broken_driver(error)
    return (
        f"there is no GPU {visible!r} here ({error}); correct CUDA_VISIBLE_DEVICES, or set it to "
        "nothing to use the processors"
    )


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  (a kernel file)
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
