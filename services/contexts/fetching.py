"""Fetches weights from the hub to this node, in a separate process, because the hub's client
cannot be interrupted and a process can.
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
    """The directory of a model (or of an adapter, see `adapter_as_model`), fetched if necessary.
    None when `stopped` became true meanwhile. HF_ variables in `environment` override those of this
    process, because a worker may have its own token or cache.

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
        why = f"the download of {spec.model!r} ended with exit code {code}:\n{output_text}"
    raise ModelError(why)
