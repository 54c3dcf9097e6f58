"""The models and engine arguments that a worker without a configured model accepts from runs.

Every producer can name a model and arguments of its engine. Many arguments of vLLM load code or
write files (`--trust-remote-code`, `--middleware`, `--worker-cls`, `--download-dir`), so only
arguments that change verdicts and do neither are accepted. A worker whose operator configured its
model is not restricted.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from services.contracts import ContextSpec, Settings
from services.models.files import is_local

ACCEPTED_ARGUMENTS = frozenset(
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
"""Arguments that change verdicts, or make a model fit into memory, and load no code."""

# vLLM sets RoPE scaling through `--hf-overrides`; its other keys can select another architecture.
_OVERRIDES = frozenset({"rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings"})
# Only full names: argparse accepts any unique prefix of a name, and vLLM accepts `_` for `-`.
_FLAG = re.compile(
    r"(--[a-z][a-z0-9_-]*)(?:\.([A-Za-z0-9_]+)[A-Za-z0-9_.]*\+?)?(?:=(.*))?", re.DOTALL
)


def refusal(spec: ContextSpec, settings: Settings) -> str | None:
    """The reason why a worker without a configured model refuses this context, with the setting
    that decides it; None if it accepts the context.
    """
    return next(_refusals(spec, settings), None)


def _refusals(spec: ContextSpec, settings: Settings) -> Iterator[str]:
    patterns = settings.accepted_models.split()
    for model in filter(None, (spec.model, spec.adapter)):
        if patterns and not any(fnmatchcase(_full_name(model), each) for each in patterns):
            yield f"KEEPWARM_ACCEPTED_MODELS has no pattern for {model!r}"
    widened = frozenset(settings.accepted_engine_arguments.split())
    flag = key = None  # of the previous argument, if the next may be its value
    for argument in spec.engine_arguments:
        found = _FLAG.fullmatch(argument)
        if found is not None:
            flag, key, value = found[1].replace("_", "-"), found[2], found[3]
        elif flag is not None and not argument.startswith("-"):
            value = argument
        else:
            yield f"{argument!r} is not an engine argument written in full, like --name=value"
            return
        if flag not in ACCEPTED_ARGUMENTS | widened:
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
    """A hub name unchanged; a directory's real path, so that patterns match what is opened."""
    try:
        return str(Path(model).expanduser().resolve()) if is_local(model) else model
    except (OSError, RuntimeError):  # a user that does not exist, or a loop of links
        return model


def _keys(value: str) -> list[str]:
    try:
        overrides = json.loads(value)
    except ValueError:
        return [value]
    return list(overrides) if isinstance(overrides, dict) else [value]
