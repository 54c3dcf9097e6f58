"""How much memory an engine needs, and how much there is: of its GPU, or of the node."""

import argparse
from pathlib import Path

import pynvml
import structlog

from services.contexts import node_memory
from services.contexts.device import Device, gpu_handle
from services.contexts.engine_command import engine_arguments, engine_environment
from services.contexts.model_files import weights_bytes
from services.contexts.plan import EnginePlan

_GIB = 1024**3
# vLLM 0.32 takes this part of a GPU where it is not told otherwise.
_GPU_SHARE = 0.92
# An engine's processes without weights and cache: measured 1.1 GiB (vLLM 0.32 on processors).
_OVERHEAD_BYTES = int(1.5 * _GIB)
# Weights in memory against weights on disk, with room for buffers.
_WEIGHTS_FACTOR = 1.3

log = structlog.get_logger(__name__)


def needed_bytes(plan: EnginePlan, known_bytes: int | None) -> int:
    """What the engine is going to take; `known_bytes` is what it took the last time, if known.

    A GPU engine takes a share of the GPU, whatever the model; one on processors its weights, its
    key-value cache and a constant.
    """
    if plan.device.kind == "cuda":
        share = _argument(plan, "--gpu-memory-utilization", _GPU_SHARE)
        return int(share * total_bytes(plan.device))
    if known_bytes:  # no engine takes nothing
        return known_bytes
    cache = int(engine_environment(plan, Path())["VLLM_CPU_KVCACHE_SPACE"]) * _GIB
    return int(_WEIGHTS_FACTOR * (weights_bytes(plan.spec) or 0)) + cache + _OVERHEAD_BYTES


def free_bytes(device: Device) -> int:
    """What another engine could have on it now."""
    if device.kind == "cuda":
        with gpu_handle(device.gpu) as handle:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    return node_memory.available_bytes()


def total_bytes(device: Device) -> int:
    """All that it has, whoever uses it."""
    if device.kind == "cuda":
        with gpu_handle(device.gpu) as handle:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return node_memory.total_bytes()


def _argument(plan: EnginePlan, flag: str, default: float) -> float:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="value", type=float, default=default)
    try:
        known, _ = parser.parse_known_args(engine_arguments(plan, Path("engine.sock")))
    except (argparse.ArgumentError, SystemExit):
        return default  # the engine will say what is wrong with it
    return float(known.value)
