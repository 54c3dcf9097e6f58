"""What this node computes on. Asked without torch or vLLM, which the worker never imports."""

import os
import platform
from dataclasses import dataclass
from typing import Literal

import psutil
import pynvml


@dataclass(frozen=True)
class Device:
    """What an engine uses: a GPU that this process may see, or the node's processors."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    """Memory free for an engine: the GPU's, or the node's."""
    cores: tuple[int, ...]
    """The processors that this process may run on."""


def find_device() -> Device:
    """The first visible NVIDIA GPU, or else the processors."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") != "":
        try:
            return _first_gpu(cores)
        except pynvml.NVMLError:
            pass  # no driver, or no GPU that we may use
    return Device("cpu", _processor_name(), psutil.virtual_memory().available, cores)


def _first_gpu(cores: tuple[int, ...]) -> Device:
    pynvml.nvmlInit()
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdecimal()
            # Slurm and MIG name devices by UUID.
            else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )
        return Device(
            kind="cuda",
            name=str(pynvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            cores=cores,
        )
    finally:
        pynvml.nvmlShutdown()


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  (a kernel file)
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
