"""Models on the hub: which commit is meant, their small files, and their weights."""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from services.contracts import ContextSpec
from services.contracts.errors import ModelError

# What an engine reads; other formats of the same weights would be fetched in vain.
_WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def fetch_weights(spec: ContextSpec) -> Path:
    """Bring a model to this node, where it is not yet; where it is. Raises ModelError."""
    try:
        directory = snapshot_download(
            spec.model, revision=spec.revision, allow_patterns=[*_WEIGHTS]
        )
    except Exception as error:  # its HTTP library's, too, which are no OSErrors
        raise _unreachable(spec.model, error) from error
    return Path(directory)


def small_file(spec: ContextSpec, name: str) -> Path | None:
    """The path of one small file of a model, fetched if need be; None when it has none such.

    Raises ModelError when the hub cannot be asked.
    """
    try:
        return Path(hf_hub_download(spec.model, name, revision=spec.revision))
    except LocalEntryNotFoundError as error:
        raise _unreachable(spec.model, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise _unreachable(spec.model, error) from error


def commit(model: str, revision: str | None) -> str:
    """The commit that a revision of a model stands for now, or did when it was fetched.

    Raises ModelError.
    """
    try:
        return str(HfApi().model_info(model, revision=revision, timeout=10).sha)
    except HfHubHTTPError as error:
        raise _unreachable(model, error) from error
    except HFValidationError as error:
        raise ModelError(
            f"{model!r} is neither a directory nor a name on the hub: {error}"
        ) from error
    except Exception as error:
        # Offline: what an earlier download left in the cache knows its commit.
        directory = cached(model, revision)
        if directory is not None:
            return directory.name
        raise _unreachable(model, error) from error


def cached(model: str, revision: str | None) -> Path | None:
    """The directory of a model that was fetched; it is named by its commit."""
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _unreachable(model: str, error: Exception) -> ModelError:
    summary = str(error).strip().partition("\n")[0] or type(error).__name__
    return ModelError(
        f"cannot get the model {model!r} from the hub: {summary}. Check the name and the network, "
        "log in for a gated model (HF_TOKEN), or give a directory with --model PATH"
    )
