"""The command line, environment and memory of vLLM's server for a plan. Any of them can be
overridden.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pynvml
import structlog

from services.contexts.plan import EnginePlan, is_engine_variable
from services.contracts.bounds import MAX_LABELS
from services.models.files import MAX_ADAPTER_RANK, is_local, weights_bytes
from services.node import memory
from services.node.device import Device, gpu_handle

_GIB = 1024**3

ENGINE_MODULE = "vllm.entrypoints.openai.api_server"

CPU_BLOCK_TOKENS = 32
"""The prefix cache holds whole blocks. With vLLM's default of 128 tokens on processors, half of the
instructions and examples would be computed again for every claim; 32 is the least that it takes.
"""
_LARGE_GPU_BYTES = 70 * _GIB
# The smallest and the largest key-value cache of one CPU engine.
_CPU_CACHE_GIB = (1, 8)
# libgomp's default is 300,000 with as many threads as cores. With 1,000, an engine that has its
# cores for itself loses an eighth of its speed, because threads fall asleep and must be woken.
_SPINS = 3_000
# Four adapters in one step; others wait for their turn in the node's memory.
_ADAPTER_ARGUMENTS = (
    "--enable-lora",
    *("--max-lora-rank", str(MAX_ADAPTER_RANK)),
    *("--max-loras", "4", "--max-cpu-loras", "32"),
)
# The share of a GPU that vLLM 0.32 takes by default.
_GPU_SHARE = 0.92
# The engine's processes without weights and cache: 1.1 GiB measured (vLLM 0.32 on processors).
_OVERHEAD_BYTES = int(1.5 * _GIB)
# Weights in memory, buffers included, compared to weights on disk.
_WEIGHTS_FACTOR = 1.3

log = structlog.get_logger(__name__)


def engine_arguments(plan: EnginePlan, socket_path: Path) -> list[str]:
    """The engine's arguments: Keepwarm's, the context's, the operator's. Later ones win."""
    spec = plan.spec
    return [
        *("--model", spec.model, "--served-model-name", spec.base.context_id),
        *(() if spec.revision is None or is_local(spec.model) else ("--revision", spec.revision)),
        *("--uds", str(socket_path)),
        *("--dtype", spec.dtype, "--max-model-len", str(spec.max_model_tokens)),
        # Scores are the model's own, not changed by sampling defaults that came with the weights.
        *("--generation-config", "vllm"),
        # In some chats a label has two spellings.
        *("--max-logprobs", str(2 * MAX_LABELS)),
        "--disable-uvicorn-access-log",
        *(("--trust-remote-code",) if plan.trust_remote_code else ()),
        *_device_arguments(plan),
        *(_ADAPTER_ARGUMENTS if plan.takes_adapters else ()),
        *spec.engine_arguments,
        *plan.arguments,
    ]


def _device_arguments(plan: EnginePlan) -> Sequence[str]:
    device, max_model_tokens = plan.device, plan.spec.max_model_tokens
    # By default the server computes fewer tokens in a step than vLLM's offline class, for the sake
    # of latency. Claims are offline work, so GPUs get the offline class's figures (vLLM 0.32). On
    # processors half of them fill the machine as well. A step there takes a second, and that much
    # work is lost when a worker is killed.
    if device.kind == "cuda":
        step = 16_384 if device.memory_bytes >= _LARGE_GPU_BYTES else 8_192
        return (
            *("--max-num-seqs", "512"),
            *("--max-num-batched-tokens", str(max(step, max_model_tokens))),
            # So that it can be put to sleep when another context needs the GPU. Sleep was never
            # tested with adapters, so an engine with adapters is stopped instead.
            *(() if plan.takes_adapters else ("--enable-sleep-mode",)),
        )
    return (
        *("--max-num-batched-tokens", str(max(2_048, max_model_tokens))),
        "--enforce-eager",  # nothing to capture or to compile for
        *("--distributed-executor-backend", "uni"),
        *("--max-num-seqs", "64"),
        *("--block-size", str(CPU_BLOCK_TOKENS)),
    )


def fork_server_environment(plan: EnginePlan) -> dict[str, str]:
    """The environment that all engines of a fork server share: the keeper's, without its settings
    and without the variables that the worker decides; what suits the device; and the plan's own
    variables, which win.
    """
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("KEEPWARM_") and not is_engine_variable(name)
    }
    chosen = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        # The engine's child processes do not search the working directory for modules.
        "PYTHONSAFEPATH": "1",
        # A thread pool that an import starts would not survive the fork; engines do not use it.
        "OPENBLAS_NUM_THREADS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }
    if plan.device.kind == "cpu":
        # Compute in the engine core's own process. By default vLLM starts one more process, where
        # it can set what OpenMP reads at its start; that is set here.
        chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        chosen["OMP_NUM_THREADS"] = str(len(cores_of(plan)))
        # A thread that finishes before the others would spin for milliseconds on a core that the
        # worker, vLLM's server or another thread of the engine needs: a worker's start would cost
        # the engine twice the time that it takes.
        if "OMP_WAIT_POLICY" not in plan.environment:  # GOMP_SPINCOUNT would override it
            chosen["GOMP_SPINCOUNT"] = str(_SPINS)
        # vLLM 0.32 compiles a small function of its sampler even with --enforce-eager. That takes
        # longer than loading the model, and needs a C++ compiler on the node.
        chosen["TORCHDYNAMO_DISABLE"] = "1"
    else:
        # Enables the endpoints for sleep and wake-up; only this user can reach the socket.
        chosen["VLLM_SERVER_DEV_MODE"] = "1"
    return {**ours, **chosen, **plan.environment}


def engine_environment(plan: EnginePlan, cache: Path) -> dict[str, str]:
    """What an engine has in addition to its fork server's environment."""
    environment = {
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    if plan.takes_adapters:
        # Adapters are loaded on request. Only this user can reach the socket.
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if is_local(plan.spec.model):
        environment["HF_HUB_OFFLINE"] = "1"
    if plan.device.kind == "cpu":
        least, most = _CPU_CACHE_GIB
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(
            max(least, min(most, plan.device.memory_bytes // _GIB // 8))
        )
    return {name: plan.environment.get(name, value) for name, value in environment.items()}


def cores_of(plan: EnginePlan) -> list[int]:
    """The cores that the engine may run on: its device's, or the operator's choice."""
    bound = plan.environment.get("VLLM_CPU_OMP_THREADS_BIND", "")
    if plan.device.kind == "cpu" and re.fullmatch(r"\d+(,\d+)*", bound):
        return [int(core) for core in bound.split(",")]
    return list(plan.device.cores)


def needed_bytes(plan: EnginePlan, known_bytes: int | None) -> int:
    """How much memory the engine will take; `known_bytes` is what it took the last time, if known.

    A GPU engine takes a fixed share of the GPU. An engine on processors takes its weights, its
    key-value cache and a constant.
    """
    if plan.device.kind == "cuda":
        share = _argument(plan, "--gpu-memory-utilization", _GPU_SHARE)
        return int(share * total_bytes(plan.device))
    if known_bytes:  # 0 cannot be right
        return known_bytes
    cache = int(engine_environment(plan, Path())["VLLM_CPU_KVCACHE_SPACE"]) * _GIB
    return int(_WEIGHTS_FACTOR * (weights_bytes(plan.spec) or 0)) + cache + _OVERHEAD_BYTES


def free_bytes(device: Device) -> int:
    """How much memory of the device another engine could have now."""
    if device.kind == "cuda":
        with gpu_handle(device.gpu) as handle:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    return memory.available_bytes()


def total_bytes(device: Device) -> int:
    """All memory of the device, used or not."""
    if device.kind == "cuda":
        with gpu_handle(device.gpu) as handle:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return memory.total_bytes()


def _argument(plan: EnginePlan, flag: str, default: float) -> float:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="value", type=float, default=default)
    try:
        known, _ = parser.parse_known_args(engine_arguments(plan, Path("engine.sock")))
    except (argparse.ArgumentError, SystemExit):
        return default  # the engine will report what is wrong with it
    return float(known.value)
