"""The plan of an engine: context, device, arguments and environment."""

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

# Set by launchers of distributed jobs; with them an engine would try to join that job.
_LAUNCHERS = r"(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
# Variables that vLLM and its libraries read. An engine has all others from its keeper.
_ENGINE_VARIABLES = re.compile(
    r"(VLLM|CUDA|NVIDIA|NCCL|TORCH|PYTORCH|TRITON|HF|HUGGING_?FACE|TRANSFORMERS|TOKENIZERS"
    r"|OMP|GOMP|KMP|MKL|OPENBLAS|LD|PYTHON)\w*"
    rf"|{_LAUNCHERS}|{SEARCHED_LAST}",
    re.IGNORECASE,
)
# Of these, the ones not passed on: they configure another server of the user, or would make the
# engine serve another model, refuse our requests, log too little, or fail to start (vLLM 0.32).
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
    """Whether engines read this environment variable, so that its value comes from the worker."""
    return _ENGINE_VARIABLES.fullmatch(variable) is not None


def _is_passed_on(variable: str) -> bool:
    return is_engine_variable(variable) and _REFUSED_VARIABLES.fullmatch(variable) is None


def _gpus(device: Device) -> dict[str, str]:
    """The variables that select the worker's GPUs. Without PCI_BUS_ID, CUDA would put the fastest
    GPU first, and the device was measured as NVML's index 0.
    """
    if device.kind != "cuda":
        return {}
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return order
    return {**order, "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus())}


class EnginePlan(Value):
    """The complete description of an engine. Workers with equal plans share one engine."""

    spec: ContextSpec
    device: Device
    python: str
    """The interpreter that has vLLM."""
    arguments: tuple[str, ...] = ()
    """The operator's arguments, which override all others."""
    trust_remote_code: bool = False
    environment: dict[str, str] = Field(default_factory=dict, repr=False)
    """Only variables that an engine reads; may contain a token for the hub."""

    @classmethod
    def of(cls, spec: ContextSpec, device: Device, settings: Settings) -> "EnginePlan":
        """The plan from a worker's settings and environment. Raises UsageError."""
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
        """The engine's name on its node: the context's id and a digest of the rest of the plan.

        The device's free memory is not part of it, because it changes when the engine runs. Nor is
        the adapter, because the adapters of a model share an engine.
        """
        rest = self.model_dump(mode="json", exclude={"spec": True, "device": {"memory_bytes"}})
        if self.takes_adapters:
            rest["takes_adapters"] = True
        context_id = self.spec.base.context_id
        return f"{context_id}-{content_id('', rest, hex_digits=8).removeprefix('-')}"
