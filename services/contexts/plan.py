"""What a keeper must know to start an engine: a context, on a device, as its worker wants it."""

import os
import re
import shlex
from functools import cached_property

from pydantic import Field

from keepwarm_start import SEARCHED_LAST
from services.contracts import ContextSpec, Settings
from services.contracts.errors import UsageError
from services.contracts.values import Value, content_id
from services.models.files import refuse_adapter_arguments
from services.node.device import Device, visible_gpus

# Left by a launcher of distributed jobs, in which an engine would take a place.
_LAUNCHERS = r"(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
# What vLLM and the libraries under it read. The rest of an engine's environment is the keeper's.
_ENGINE_VARIABLES = re.compile(
    r"(VLLM|CUDA|NVIDIA|NCCL|TORCH|PYTORCH|TRITON|HF|HUGGING_?FACE|TRANSFORMERS|TOKENIZERS"
    r"|OMP|GOMP|KMP|MKL|OPENBLAS|LD|PYTHON)\w*"
    rf"|{_LAUNCHERS}|{SEARCHED_LAST}",
    re.IGNORECASE,
)
# Of these, what is meant for another server of the user's, or would make the engine answer for
# another model, refuse our requests, hide what its log must tell, or not start (vLLM 0.32).
_REFUSED_VARIABLES = re.compile(
    r"VLLM_(API_KEY|USE_MODELSCOPE|MODEL_REDIRECT_PATH|PLUGINS|PORT|SERVER_DEV_MODE"
    r"|SKIP_MODEL_NAME_VALIDATION|TEST_FORCE_LOAD_FORMAT|MOE_ROUTING_SIMULATION_STRATEGY"
    r"|MAX_COMPLETION_PROMPTS|MAX_N_SEQUENCES|KEEP_ALIVE_ON_ENGINE_DEATH"
    r"|ALLOW_RUNTIME_LORA_UPDATING|ALLOW_INSECURE_SERIALIZATION|RPC_BASE_PATH"
    r"|USE_RUST_FRONTEND|RUST_FRONTEND_PATH|CONFIGURE_LOGGING|TRACE_FUNCTION|DEBUG_DUMP_PATH"
    r"|DEBUG_LOG_API_SERVER_RESPONSE|(LORA_RESOLVER|LOGGING|DP|RAY|ELASTIC_EP)_\w+)"
    rf"|{_LAUNCHERS}|TORCHELASTIC_\w+"
    r"|PYTHON(?!(NOUSERSITE|USERBASE|DONTWRITEBYTECODE|PYCACHEPREFIX|HASHSEED|MALLOC|UTF8"
    r"|IOENCODING|UNBUFFERED|FAULTHANDLER)$)\w*",
    re.IGNORECASE,
)


def is_engine_variable(variable: str) -> bool:
    """Whether an engine reads this environment variable, so that its worker decides it."""
    return _ENGINE_VARIABLES.fullmatch(variable) is not None


def _is_passed_on(variable: str) -> bool:
    return is_engine_variable(variable) and _REFUSED_VARIABLES.fullmatch(variable) is None


def _gpus(device: Device) -> dict[str, str]:
    """The GPUs that the worker may use, by names that vLLM takes. Without names CUDA would begin
    with the fastest one, and we have measured that of index 0.
    """
    if device.kind != "cuda":
        return {}
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return order
    return {**order, "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus())}


class EnginePlan(Value):
    """Equal plans are one engine: a second worker with the same one attaches to it."""

    spec: ContextSpec
    device: Device
    python: str
    """The interpreter that has vLLM."""
    arguments: tuple[str, ...] = ()
    """The operator's own, which win over all others."""
    trust_remote_code: bool = False
    environment: dict[str, str] = Field(default_factory=dict, repr=False)
    """Only the variables that an engine reads; a token for the hub may be among them."""

    @classmethod
    def of(cls, spec: ContextSpec, device: Device, settings: Settings) -> "EnginePlan":
        """What a worker with these settings and this environment wants. Raises UsageError."""
        try:
            arguments = shlex.split(settings.engine_arguments)
        except ValueError as error:
            raise UsageError(f"KEEPWARM_ENGINE_ARGUMENTS does not parse: {error}") from error
        refuse_adapter_arguments("KEEPWARM_ENGINE_ARGUMENTS", tuple(arguments))
        return cls(
            spec=spec,
            device=device,
            python=str(settings.engine_python),
            arguments=tuple(arguments),
            trust_remote_code=settings.engine_trust_remote_code,
            environment={
                **{name: value for name, value in os.environ.items() if _is_passed_on(name)},
                **_gpus(device),
            },
        )

    @property
    def takes_adapters(self) -> bool:
        return self.spec.adapter is not None

    @cached_property
    def name(self) -> str:
        """The engine's name on its node: the context's, and a digest of all else that matters.

        How much memory is free is not part of it: that changes as soon as the engine runs. Which
        adapter it is asked for is not part of it either: adapters of one model share an engine.
        """
        rest = self.model_dump(mode="json", exclude={"spec": True, "device": {"memory_bytes"}})
        if self.takes_adapters:
            rest["takes_adapters"] = True
        context_id = self.spec.base.context_id
        return f"{context_id}-{content_id('', rest, hex_digits=8).removeprefix('-')}"
