"""Where a model's files are, and which weights exactly are meant."""

import hashlib
from pathlib import Path

from services.contracts import ContextSpec
from services.contracts.errors import ModelError

_WHOLE_FILE_BYTES = 4 * 1024 * 1024
_SAMPLE_BYTES = 1024 * 1024


def is_local(model: str) -> bool:
    """Whether `--model` means a directory of this machine and not a name on the hub."""
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def pin_model(spec: ContextSpec) -> ContextSpec:
    """`spec` with an absolute path or a hub name, and the revision that it stands for now.

    A local directory is pinned by a fingerprint of its files, a hub name by its commit, so that
    answers of a model that changed in place are never taken for the old one's.
    Raises ModelError.
    """
    if not is_local(spec.model):
        from services.contexts import hub  # a quarter of a second, which local models need not pay

        return spec.model_copy(update={"revision": hub.commit(spec.model, spec.revision)})
    try:
        directory = Path(spec.model).expanduser().resolve()
    except RuntimeError as error:
        raise ModelError(f"there is no model at {spec.model}: {error}") from error
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"there is no model at {directory}: it must be a directory with config.json, the "
            "weights and tokenizer.json. `make demo` makes one in .models/; a name like "
            "HuggingFaceTB/SmolLM2-135M-Instruct is fetched from the hub"
        )
    try:
        fingerprint = _fingerprint(directory)
    except OSError as error:
        raise ModelError(
            f"the model at {directory} cannot be read: {error.filename}: {error.strerror}; mend "
            "its permissions"
        ) from error
    if spec.revision not in (None, fingerprint):
        raise ModelError(
            f"the model at {directory} is {fingerprint}, but {spec.revision} is wanted: its files "
            "changed, or this is another model. Put the right files there, or submit the claims "
            "anew for this one"
        )
    return spec.model_copy(update={"model": str(directory), "revision": fingerprint})


def model_file(spec: ContextSpec, name: str) -> Path | None:
    """The path of one small file of the model, fetched if need be; None when it has none such.

    Raises ModelError when the hub cannot be asked.
    """
    if is_local(spec.model):
        path = Path(spec.model) / name
        return path if path.is_file() else None
    from services.contexts import hub

    return hub.small_file(spec, name)


def weights_bytes(spec: ContextSpec) -> int | None:
    """What the files of a model's weights take on this node; None where there are none, or not
    yet.
    """
    directory: Path | None = Path(spec.model)
    if not is_local(spec.model):
        from services.contexts import hub

        directory = hub.cached(spec.model, spec.revision)
    if directory is None:
        return None
    try:
        return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None
    except OSError:
        return None


def _fingerprint(directory: Path) -> str:
    """Names, sizes and contents; of files over 4 MiB the first and last MiB: weights are large."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(-_SAMPLE_BYTES, 2)
                digest.update(file.read())
    return f"files-{digest.hexdigest()}"
