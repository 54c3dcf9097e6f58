"""How vLLM's server is called for a context on a device. Every argument can be overridden."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from services.contexts.device import Device
from services.contexts.model_files import is_local
from services.contracts import ContextSpec, Settings
from services.contracts.bounds import MAX_LABELS
from services.contracts.errors import UsageError

_GIB = 1024**3
_LARGE_GPU_BYTES = 70 * _GIB
# The least and the most of a node's memory that one CPU engine takes for its key-value cache.
_CPU_CACHE_GIB = (1, 8)


def engine_command(
    spec: ContextSpec, device: Device, socket_path: Path, settings: Settings
) -> list[str]:
    """The command line of the engine. Later arguments win: the worker's choice, the context's,
    the operator's (`KEEPWARM_ENGINE_ARGUMENTS`). Raises UsageError when the latter do not parse.
    """
    try:
        own_arguments = shlex.split(settings.engine_arguments)
    except ValueError as error:
        raise UsageError(f"KEEPWARM_ENGINE_ARGUMENTS does not parse: {error}") from error
    return [
        *(str(settings.engine_python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", spec.model, "--served-model-name", spec.context_id),
        *(() if spec.revision is None or is_local(spec.model) else ("--revision", spec.revision)),
        *("--uds", str(socket_path)),
        *("--dtype", spec.dtype, "--max-model-len", str(spec.max_model_tokens)),
        # Scores are the model's own, not bent by sampling defaults that came with the weights.
        *("--generation-config", "vllm"),
        *("--max-logprobs", str(MAX_LABELS)),
        "--disable-uvicorn-access-log",
        *(("--trust-remote-code",) if settings.engine_trust_remote_code else ()),
        *_device_arguments(device, spec.max_model_tokens),
        *spec.engine_arguments,
        *own_arguments,
    ]


def _device_arguments(device: Device, max_model_tokens: int) -> Sequence[str]:
    # The server as it comes computes fewer tokens a step than vLLM's offline class does, for the
    # sake of latency. Claims are offline work: these are the offline class's figures (vLLM 0.32).
    if device.kind == "cuda":
        step = 16_384 if device.memory_bytes >= _LARGE_GPU_BYTES else 8_192
        return (
            *("--max-num-seqs", "512"),
            *("--max-num-batched-tokens", str(max(step, max_model_tokens))),
        )
    return (
        *("--max-num-batched-tokens", str(max(4_096, max_model_tokens))),
        # Nothing to capture or to compile for; the executor in the engine's own process saves the
        # start of one more.
        "--enforce-eager",
        *("--distributed-executor-backend", "uni"),
        *("--max-num-seqs", "64"),
    )


def engine_environment(spec: ContextSpec, device: Device) -> dict[str, str]:
    """The engine's environment: ours without our secrets, and what suits the device.

    What the operator has set (`VLLM_…`) wins.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("KEEPWARM_")
    }
    chosen = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    if is_local(spec.model):
        chosen["HF_HUB_OFFLINE"] = "1"
    if device.kind == "cpu":
        least, most = _CPU_CACHE_GIB
        chosen["VLLM_CPU_KVCACHE_SPACE"] = str(
            max(least, min(most, device.memory_bytes // _GIB // 8))
        )
        # Without this vLLM keeps one core back.
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in device.cores)
    return {**chosen, **environment}
