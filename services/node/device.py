"""The device of an engine: a GPU or the processors. Found without torch and vLLM, which the worker
never imports.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import pynvml

from services.contracts.errors import EngineStartError
from services.node.memory import available_bytes

# Without NVML's library or a loaded driver there is no usable GPU. Any other error means that the
# driver exists and does not work.
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
    """The GPU's UUID, whichever name CUDA_VISIBLE_DEVICES has for it."""


def find_device() -> Device:
    """The first visible NVIDIA GPU, or else the processors.

    Raises EngineStartError if CUDA_VISIBLE_DEVICES names a missing GPU, or if there is a driver
    that does not answer.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    gpus = visible_gpus()
    if gpus:
        return _gpu(gpus[0], cores)
    return Device("cpu", _processor_name(), available_bytes(), cores)


def visible_gpus() -> list[str]:
    """The UUIDs of the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES. That
    has indexes (in PCI bus order, as in NVML), UUIDs, or the beginnings of UUIDs (HTCondor), which
    CUDA accepts, but NVML and vLLM do not. A name that matches no GPU is returned unchanged.

    Raises EngineStartError if the variable is not set and a driver does not answer.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        # Like CUDA: the first invalid name (-1, NoDevFiles) hides all names after it.
        names = list(takewhile(_names_a_gpu, (name.strip() for name in named.split(","))))
        gpus: list[str] = []
        instances: list[str] = []
        if names:
            with suppress(pynvml.NVMLError):  # `gpu_handle` reports it
                gpus, instances = _uuids()
        return [_full_uuid(name, gpus, instances) for name in names]
    try:
        return _uuids()[0]
    except pynvml.NVMLError as error:
        if error.value in _NO_DRIVER:
            return []
        raise EngineStartError(_broken_driver(error)) from error


def _uuids() -> tuple[list[str], list[str]]:
    """The UUIDs of all GPUs, by index, and of their MIG instances. Raises NVMLError."""
    with nvml():
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        gpus = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        return gpus, [uuid for handle in handles for uuid in _instances(handle)]


def _instances(gpu: Any) -> Iterator[str]:
    try:
        most = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except pynvml.NVMLError:
        return  # it does not support MIG
    for index in range(most):
        with suppress(pynvml.NVMLError):  # no instance has this index
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
            yield str(pynvml.nvmlDeviceGetUUID(instance))


def _full_uuid(name: str, gpus: list[str], instances: list[str]) -> str:
    """The UUID with this index or beginning; the name itself if none matches, or several do."""
    if name.isdecimal():
        return gpus[int(name)] if int(name) < len(gpus) else name
    matching = [uuid for uuid in (*gpus, *instances) if uuid.startswith(name)]
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
    """NVIDIA's management library, initialised within the block. Raises pynvml.NVMLError."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def gpu_handle(visible: str) -> Iterator[Any]:
    """NVML's handle of a GPU. Raises EngineStartError if there is no such GPU."""
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
