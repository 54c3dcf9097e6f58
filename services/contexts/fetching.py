"""Weights from the hub to this node, in a process that can be ended: the hub's client cannot be
told to stop.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from keepwarm_start import python_command
from services.contracts import ContextSpec
from services.contracts.errors import ModelError
from services.models.files import is_local
from services.node.supervision import SupervisedProcess

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 1.0


def fetch(
    spec: ContextSpec, environment: Mapping[str, str], stopped: Callable[[], bool]
) -> Path | None:
    """Where the files of a model, or of an adapter that is given as one, are on this node; fetched
    if need be. None when `stopped` said so meanwhile. `environment` wins over ours: whoever asks
    may have a token, or a cache of their own.

    Raises ModelError.
    """
    if is_local(spec.model):
        return Path(spec.model)
    with tempfile.TemporaryFile() as output:
        process = SupervisedProcess(
            python_command("services.models.hub", spec.model_dump_json()),
            environment={
                **os.environ,
                **{name: value for name, value in environment.items() if name.startswith("HF_")},
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
            grace_seconds=_GRACE_SECONDS,
            output=output,
        )
        try:
            while process.wait(_POLL_SECONDS) is None:
                if stopped():
                    return None
        finally:
            if process.exit_code() is None:
                process.kill()
            code = process.stop()
        output.seek(0)
        output_text = output.read().decode(errors="replace").strip()
    try:
        answer = json.loads(output_text.rpartition("\n")[2])
        if "directory" in answer:
            return Path(answer["directory"])
        why = str(answer["error"])
    except (ValueError, KeyError, TypeError):
        why = f"the download of {spec.model!r} ended with exit code {code}. It said:\n{output_text}"
    raise ModelError(why)
