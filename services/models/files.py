"""The files of a model and its adapter, and their revision: the identity of the weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import structlog

from services.contracts import ContextSpec
from services.contracts.errors import ModelError, UsageError
from services.models.fingerprint import ProgressCallback, fingerprint, sampled_fingerprint
from services.models.weights import check_adapter, check_model

_ADAPTER_CONFIG = "adapter_config.json"
# For each kind of directory: the file that it must have, and the rest of the error message.
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
"""The largest rank of an adapter without further engine arguments: adapters of a model share an
engine, whose buffers have this rank.
"""

log = structlog.get_logger(__name__)


def is_local(model: str) -> bool:
    """Whether `--model` is a directory on this machine, and not a name on the hub."""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def pin_model(
    spec: ContextSpec,
    cache_dir: Path | None = None,
    on_progress: ProgressCallback = lambda done, total: None,
) -> ContextSpec:
    """`spec` with an absolute path or a hub name, and its current revision.

    The revision of a local directory is a fingerprint of its files; that of a hub name is its
    commit. A model that changed in place is therefore another context. The same applies to the
    adapter. With a `cache_dir`, large files are read only once; `on_progress` is called while they
    are. Raises ModelError, and UsageError for engine arguments that would have no effect.
    """
    refuse_adapter_arguments("--engine-argument", spec.engine_arguments)
    return _pin_adapter(_pin_base(spec, cache_dir, on_progress), cache_dir, on_progress)


def refuse_adapter_arguments(where: str, arguments: tuple[str, ...]) -> None:
    """Raises UsageError for arguments that load an adapter: requests select an adapter by name, and
    these arguments do not change the requested name, so the base model would answer.
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
        from services.models import hub  # takes 0.25 s to import, and local models do not need it

        return spec.model_copy(update={"revision": hub.current_commit(spec.model, spec.revision)})
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

        path, revision = spec.adapter, hub.current_commit(spec.adapter, spec.adapter_revision)
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

    Raises ModelError if it is not there, cannot be read, is not complete, or is not of the
    `revision` wanted.
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
    with _readable(kind, directory):
        if kind == "model":
            check_model(directory)
        found = _fingerprint(directory, revision, cache_dir, on_progress)
    if revision not in (None, found):
        raise ModelError(
            f"the {kind} at {directory} is {found}, but {revision} is required: its files changed, "
            f"or this is another {kind}. Restore the right files, or submit the claims again for "
            "this one"
        )
    return str(directory), found


@contextmanager
def _readable(kind: Literal["model", "adapter"], directory: Path) -> Iterator[None]:
    """Raises ModelError if a file of the directory cannot be read."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"the {kind} at {directory} cannot be read: {error.filename}: {error.strerror}; "
            "correct its permissions"
        ) from error


def _fingerprint(
    directory: Path, wanted: str | None, cache_dir: Path | None, on_progress: ProgressCallback
) -> str:
    """The fingerprint of a directory; `wanted` if that is its fingerprint by the older method."""
    found = fingerprint(directory, cache_dir, on_progress)
    if wanted not in (None, found) and wanted == sampled_fingerprint(directory):
        # A run submitted by a version that did not read whole files can still be completed.
        log.warning("model.pinned_by_a_sample", directory=str(directory), revision=wanted)
        return wanted
    return found


def _check_adapter(spec: ContextSpec) -> None:
    """Raises ModelError for an adapter that engines cannot load, before an engine is started."""
    path = model_file(adapter_as_model(spec), _ADAPTER_CONFIG)
    if path is None:
        raise ModelError(
            f"{spec.adapter} has no {_ADAPTER_CONFIG}, so it is not an adapter as PEFT saves it; "
            "if it is a whole model, use --model instead"
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
            "engines load only LoRA. Merge it into its model (PEFT's merge_and_unload), and use "
            "--model for the result"
        )
    chosen = any(
        argument.replace("_", "-").startswith("--max-lora-rank")
        for argument in spec.engine_arguments
    )
    if rank > MAX_ADAPTER_RANK and not chosen:
        needed = 2 ** (rank - 1).bit_length()
        raise ModelError(
            f"the adapter {spec.adapter} has rank {rank}; by default engines load at most rank "
            f"{MAX_ADAPTER_RANK}. Add --engine-argument=--max-lora-rank={needed}"
        )
    assert spec.adapter is not None
    if is_local(spec.adapter):
        check_adapter_weights(
            Path(spec.adapter), Path(spec.model) if is_local(spec.model) else None
        )


def check_adapter_weights(adapter: Path, model: Path | None) -> None:
    """Raises ModelError for an adapter in this directory that has no weights, or does not fit the
    model in the directory `model`; without one they are not compared.
    """
    with _readable("adapter", adapter):
        check_adapter(adapter, model)


def adapter_as_model(spec: ContextSpec) -> ContextSpec:
    """A spec whose model is the adapter, because its files are found and fetched like a model's."""
    assert spec.adapter is not None
    return ContextSpec(model=spec.adapter, revision=spec.adapter_revision)


def model_file(spec: ContextSpec, name: str) -> Path | None:
    """The path of one small file of the model, fetched if necessary; None if the model has no such
    file. Raises ModelError when the hub cannot be reached.
    """
    if is_local(spec.model):
        path = Path(spec.model) / name
        return path if path.is_file() else None
    from services.models import hub

    return hub.small_file(spec, name)


def weights_bytes(spec: ContextSpec) -> int | None:
    """The size of a model's weights on this node; None if they are not here (yet)."""
    directory: Path | None = Path(spec.model)
    if not is_local(spec.model):
        from services.models import hub

        directory = hub.cached_directory(spec.model, spec.revision)
    if directory is None:
        return None
    try:
        return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None
    except OSError:
        return None
