"""Where the files of a model and its adapter are, and which weights exactly are meant."""

import json
from pathlib import Path
from typing import Any, Literal

import structlog

from services.contracts import ContextSpec
from services.contracts.errors import ModelError, UsageError
from services.models.fingerprint import ProgressCallback, fingerprint, sampled_fingerprint

_ADAPTER_CONFIG = "adapter_config.json"
# Of a directory: the file that it must have, and the rest of the sentence that says so.
_DIRECTORIES = {
    "model": (
        "config.json",
        ", the weights and tokenizer.json. `make demo` makes one in .models/; a name like "
        "HuggingFaceTB/SmolLM2-135M-Instruct is fetched from the hub",
    ),
    "adapter": (
        _ADAPTER_CONFIG,
        " and adapter_model.safetensors, as PEFT saves it. A name like ORG/ADAPTER is fetched from "
        "the hub",
    ),
}
MAX_ADAPTER_RANK = 64
"""The largest rank of adapters that engines take as they come: adapters share an engine, whose
buffers have this rank.
"""

log = structlog.get_logger(__name__)


def is_local(model: str) -> bool:
    """Whether `--model` means a directory of this machine and not a name on the hub."""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def pin_model(
    spec: ContextSpec,
    cache_dir: Path | None = None,
    on_progress: ProgressCallback = lambda done, total: None,
) -> ContextSpec:
    """`spec` with an absolute path or a hub name, and the revision that it stands for now.

    A local directory is pinned by a fingerprint of its files, a hub name by its commit, so that
    answers of a model that changed in place are never taken for the old one's. The same goes for
    its adapter. Large files are read once where there is a `cache_dir`; `on_progress` is told
    how far that is. Raises ModelError, and UsageError for engine arguments that would be ignored.
    """
    refuse_adapter_arguments("--engine-argument", spec.engine_arguments)
    return _pin_adapter(_pin_base(spec, cache_dir, on_progress), cache_dir, on_progress)


def refuse_adapter_arguments(where: str, arguments: tuple[str, ...]) -> None:
    """Raises UsageError for arguments that load an adapter: a request names its model, and these
    do not change the name, so every answer would be the base model's.
    """
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in ("--enable-lora", "--lora-modules"):
            raise UsageError(
                f"{where}: {flag} loads an adapter that no request would name, so that all answers "
                "would be the base model's; use --adapter PATH or --adapter HUB_NAME instead"
            )


def _pin_base(
    spec: ContextSpec, cache_dir: Path | None, on_progress: ProgressCallback
) -> ContextSpec:
    if not is_local(spec.model):
        from services.models import hub  # a quarter of a second, which local models need not pay

        return spec.model_copy(update={"revision": hub.commit(spec.model, spec.revision)})
    path, revision = _pin_directory("model", spec.model, spec.revision, cache_dir, on_progress)
    return spec.model_copy(update={"model": path, "revision": revision})


def _pin_adapter(
    spec: ContextSpec, cache_dir: Path | None, on_progress: ProgressCallback
) -> ContextSpec:
    if spec.adapter is None:
        return spec
    if is_local(spec.adapter):
        path, revision = _pin_directory(
            "adapter", spec.adapter, spec.adapter_revision, cache_dir, on_progress
        )
    else:
        from services.models import hub

        path, revision = spec.adapter, hub.commit(spec.adapter, spec.adapter_revision)
    pinned = spec.model_copy(update={"adapter": path, "adapter_revision": revision})
    _check_adapter(pinned)
    return pinned


def _pin_directory(
    kind: Literal["model", "adapter"],
    path: str,
    revision: str | None,
    cache_dir: Path | None,
    on_progress: ProgressCallback,
) -> tuple[str, str]:
    """The absolute path of a local model or adapter, and its revision.

    Raises ModelError if it is not there, cannot be read, or is not of the `revision` wanted.
    """
    required, hint = _DIRECTORIES[kind]
    try:
        directory = Path(path).expanduser().resolve()
    except RuntimeError as error:
        raise ModelError(f"there is no {kind} at {path}: {error}") from error
    if not (directory / required).is_file():
        raise ModelError(
            f"there is no {kind} at {directory}: it must be a directory with {required}{hint}"
        )
    try:
        found = _fingerprint(directory, revision, cache_dir, on_progress)
    except OSError as error:
        raise ModelError(
            f"the {kind} at {directory} cannot be read: {error.filename}: {error.strerror}; "
            "correct its permissions"
        ) from error
    if revision not in (None, found):
        raise ModelError(
            f"the {kind} at {directory} is {found}, but {revision} is wanted: its files changed, "
            f"or this is another {kind}. Put the right files there, or submit the claims again for "
            "this one"
        )
    return str(directory), found


def _fingerprint(
    directory: Path, wanted: str | None, cache_dir: Path | None, on_progress: ProgressCallback
) -> str:
    """The fingerprint of a directory's files; the one that is wanted where they have that too."""
    found = fingerprint(directory, cache_dir, on_progress)
    if wanted not in (None, found) and wanted == sampled_fingerprint(directory):
        # Of a run that was submitted before whole files were read: it can be completed.
        log.warning("model.pinned_by_a_sample", directory=str(directory), revision=wanted)
        return wanted
    return found


def _check_adapter(spec: ContextSpec) -> None:
    """Raises ModelError for an adapter that engines do not take: known before one is started."""
    path = model_file(adapter_as_model(spec), _ADAPTER_CONFIG)
    if path is None:
        raise ModelError(
            f"{spec.adapter} has no {_ADAPTER_CONFIG}, so it is no adapter as PEFT saves it; is it "
            "a whole model? Then give it with --model"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        kind = str(config.get("peft_type", "LORA"))
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{_ADAPTER_CONFIG} of the adapter {spec.adapter} cannot be read: {error!r}"
        ) from error
    if kind != "LORA" or config.get("use_dora"):
        raise ModelError(
            f"the adapter {spec.adapter} is of the kind {'DoRA' if kind == 'LORA' else kind}; "
            "engines take LoRA alone. Merge it into its model (PEFT's merge_and_unload), and give "
            "that with --model"
        )
    chosen = any(
        argument.replace("_", "-").startswith("--max-lora-rank")
        for argument in spec.engine_arguments
    )
    if rank > MAX_ADAPTER_RANK and not chosen:
        needed = 2 ** (rank - 1).bit_length()
        raise ModelError(
            f"the adapter {spec.adapter} has rank {rank}; engines take {MAX_ADAPTER_RANK} as they "
            f"come. Give --engine-argument=--max-lora-rank={needed} as well"
        )


def adapter_as_model(spec: ContextSpec) -> ContextSpec:
    """The adapter as what is fetched and looked for like a model."""
    assert spec.adapter is not None
    return ContextSpec(model=spec.adapter, revision=spec.adapter_revision)


def model_file(spec: ContextSpec, name: str) -> Path | None:
    """The path of one small file of the model, fetched if need be; None when it has none such.

    Raises ModelError when the hub cannot be asked.
    """
    if is_local(spec.model):
        path = Path(spec.model) / name
        return path if path.is_file() else None
    from services.models import hub

    return hub.small_file(spec, name)


def weights_bytes(spec: ContextSpec) -> int | None:
    """What the files of a model's weights take on this node; None where there are none, or not
    yet.
    """
    directory: Path | None = Path(spec.model)
    if not is_local(spec.model):
        from services.models import hub

        directory = hub.cached(spec.model, spec.revision)
    if directory is None:
        return None
    try:
        return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None
    except OSError:
        return None
