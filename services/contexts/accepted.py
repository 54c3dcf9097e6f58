"""What a worker without a model accepts from runs: which models, and which engine arguments.

Whoever may publish a run names a model and its engine's arguments. Many arguments of vLLM load code
or write files (`--trust-remote-code`, `--middleware`, `--worker-cls`, `--download-dir`).
Only those that change verdicts and do neither are accepted. A worker that is given its model by its
operator is not restricted.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from services.contracts import ContextSpec, Settings
from services.models.files import is_local

ENGINE_ARGUMENTS = frozenset(
    {
        "--quantization",
        "--kv-cache-dtype",
        "--hf-overrides",
        "--tensor-parallel-size",
        "--pipeline-parallel-size",
        "--max-lora-rank",
        "--seed",
        "--enforce-eager",
        "--disable-sliding-window",
        "--mamba-cache-dtype",
        "--mamba-ssm-cache-dtype",
    }
)
"""Arguments that change verdicts, or that a model needs to fit, and that load no code."""

# vLLM sets RoPE scaling through `--hf-overrides`; its other keys can select another architecture.
_OVERRIDES = frozenset({"rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings"})
# A full name alone: argparse takes any unique beginning of a name, and vLLM `_` for `-`.
_FLAG = re.compile(
    r"(--[a-z][a-z0-9_-]*)(?:\.([A-Za-z0-9_]+)[A-Za-z0-9_.]*\+?)?(?:=(.*))?", re.DOTALL
)


def refusal(spec: ContextSpec, settings: Settings) -> str | None:
    """Why a worker without a model does not serve this context, and which setting decides it;
    None where it does.
    """
    return next(_refusals(spec, settings), None)


def _refusals(spec: ContextSpec, settings: Settings) -> Iterator[str]:
    patterns = settings.accepted_models.split()
    for model in filter(None, (spec.model, spec.adapter)):
        if patterns and not any(fnmatchcase(_full_name(model), each) for each in patterns):
            yield f"KEEPWARM_ACCEPTED_MODELS has no pattern for {model!r}"
    widened = frozenset(settings.accepted_engine_arguments.split())
    flag = key = None  # of the argument before, where this one may be its value
    for argument in spec.engine_arguments:
        found = _FLAG.fullmatch(argument)
        if found is not None:
            flag, key, value = found[1].replace("_", "-"), found[2], found[3]
        elif flag is not None and not argument.startswith("-"):
            value = argument
        else:
            yield f"{argument!r} is not an engine argument written in full, like --name=value"
            return
        if flag not in ENGINE_ARGUMENTS | widened:
            yield (
                f"the engine argument {flag} is not accepted from runs; name it in "
                "KEEPWARM_ACCEPTED_ENGINE_ARGUMENTS to accept it"
            )
        if flag == "--hf-overrides" and flag not in widened:
            keys = [key] if key else [] if value is None else _keys(value)
            if not _OVERRIDES.issuperset(keys):
                yield (
                    f"of --hf-overrides only {', '.join(sorted(_OVERRIDES))} are accepted from "
                    "runs; name it in KEEPWARM_ACCEPTED_ENGINE_ARGUMENTS to accept all"
                )
        if value is not None:
            flag = None


def _full_name(model: str) -> str:
    """A hub name as it is; a directory without links and `..`, which patterns would not see."""
    try:
        return str(Path(model).expanduser().resolve()) if is_local(model) else model
    except (OSError, RuntimeError):  # a user that does not exist, a loop of links
        return model


def _keys(value: str) -> list[str]:
    try:
        overrides = json.loads(value)
    except ValueError:
        return [value]
    return list(overrides) if isinstance(overrides, dict) else [value]
