"""Models on the hub: their commits, small files and weights.

Run as a command, it fetches the weights of one model (services/contexts/fetching.py).
"""

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from services.contracts import ContextSpec
from services.contracts.clock import awake_seconds
from services.contracts.errors import ModelError

# For transfers that make no progress; a hub that does not answer is given up after seconds.
_STALLED_SECONDS = 600.0
_PROGRESS_CHECK_SECONDS = 1.0
# The files that an engine reads; other formats of the same weights are not needed.
_WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def fetch_weights(spec: ContextSpec) -> Path:
    """Fetch a model if it is not on this node yet; returns its directory. Raises ModelError."""
    try:
        directory = snapshot_download(
            spec.model, revision=spec.revision, allow_patterns=[*_WEIGHTS]
        )
    except Exception as error:  # errors of its HTTP library are not OSErrors
        raise _unreachable(spec.model, error) from error
    return Path(directory)


def small_file(spec: ContextSpec, name: str) -> Path | None:
    """The path of one small file of a model, fetched if necessary; None if the model has no such
    file. Raises ModelError when the hub cannot be reached.
    """
    try:
        return Path(hf_hub_download(spec.model, name, revision=spec.revision))
    except LocalEntryNotFoundError as error:
        raise _unreachable(spec.model, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise _unreachable(spec.model, error) from error


def current_commit(model: str, revision: str | None) -> str:
    """The current commit of a model's revision; without a network, its commit when it was fetched.

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
        # Without a network: an earlier download in the cache is named by its commit.
        directory = cached_directory(model, revision)
        if directory is not None:
            return directory.name
        raise _unreachable(model, error) from error


def cached_directory(model: str, revision: str | None) -> Path | None:
    """The directory of a fetched model, which is named by its commit; None if there is none."""
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _unreachable(model: str, error: Exception) -> ModelError:
    """An error with its cause and the next step for that cause."""
    summary = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return ModelError(
        f"cannot get the model {model!r} from the hub: {summary}. {_next_step(model, error)}"
    )


def _next_step(model: str, error: Exception) -> str:
    disk = _disk_error(error)
    if disk is not None:
        what = "The disk quota is used up" if disk == errno.EDQUOT else "The disk is full"
        return (
            f"{what} in {constants.HF_HUB_CACHE}: make room there, or set HF_HOME to a directory "
            "on a larger disk"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"It is a gated model: accept its terms at {constants.ENDPOINT}/{model}, and set "
            "HF_TOKEN to a token of your account"
        )
    if isinstance(error, RevisionNotFoundError):
        return "It has no such revision: correct --revision"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "The hub has no such model, or it is private: check the name, set HF_TOKEN for a "
            "private one, or give a directory with --model PATH"
        )
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code in (401, 403):
            return "The hub refuses the token: correct HF_TOKEN, or unset it for a public model"
        if error.response.status_code == 429:
            return (
                "The hub limits how many requests it answers: try again in some minutes, or set "
                "HF_TOKEN, because the limit for an account is higher"
            )
        return "The hub failed to answer: try again later, or give a directory with --model PATH"
    if constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE is set, and the model is not in the cache "
            f"({constants.HF_HUB_CACHE}): fetch it on a machine with a network, or unset it"
        )
    return (
        f"Does this machine reach {constants.ENDPOINT}? Behind a proxy set HTTPS_PROXY; without a "
        "network fetch the model elsewhere, and give its directory with --model PATH"
    )


def _disk_error(error: BaseException | None) -> int | None:
    """ENOSPC or EDQUOT, if the error or one of its causes is that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _main() -> None:
    spec = ContextSpec.model_validate_json(sys.argv[1])
    threading.Thread(target=_end_if_stalled, args=(spec,), daemon=True).start()
    try:
        _answer("directory", str(fetch_weights(spec)))
    except ModelError as error:
        _answer("error", str(error))


def _answer(kind: str, value: str) -> None:
    sys.stdout.write(f"\n{json.dumps({kind: value})}\n")
    sys.stdout.flush()


def _end_if_stalled(spec: ContextSpec) -> None:
    """End this process if the download makes no progress. Another process may be fetching the same
    model while this one waits for it, so progress is measured by the files on disk.
    """
    files = Path(constants.HF_HUB_CACHE) / f"models--{spec.model.replace('/', '--')}" / "blobs"
    size, since = -1, awake_seconds()
    while awake_seconds() - since < _STALLED_SECONDS:
        time.sleep(_PROGRESS_CHECK_SECONDS)
        now = _size(files)
        if now != size:
            size, since = now, awake_seconds()
    _answer(
        "error",
        f"the download of {spec.model!r} makes no progress: nothing was written to {files} for "
        f"{_STALLED_SECONDS:g} s. Try again later, it resumes there; or fetch the model elsewhere "
        "and name its directory with --model PATH",
    )
    os._exit(1)


def _size(directory: Path) -> int:
    try:
        return sum(file.stat().st_blocks for file in directory.iterdir())
    except OSError:  # the directory does not exist yet, or a file is being renamed
        return 0


if __name__ == "__main__":
    _main()
