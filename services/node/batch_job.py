"""The process's job id in its cluster's scheduler, so that a user can relate the two."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from services.contracts.heartbeats import JOB_ID

_MAX_AD_BYTES = 1024 * 1024


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's `JOB`, or `ARRAY_TASK` as `squeue` writes it; HTCondor's `CLUSTER.PROC`; else None.

    Slurm: https://slurm.schedmd.com/sbatch.html (output environment variables). HTCondor puts the
    job's ClassAd, a line for each attribute, into the file in `_CONDOR_JOB_AD`.
    """
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID", "") for name in ("JOB", "TASK"))
    advertisement = environment.get("_CONDOR_JOB_AD", "")
    if array and task:
        found = f"{array}_{task}"
    elif advertisement:
        found = _condor_job(Path(advertisement))
    else:
        found = environment.get("SLURM_JOB_ID", "")
    return found if re.fullmatch(JOB_ID, found) else None


def _condor_job(advertisement: Path) -> str:
    try:
        with advertisement.open("rb") as file:
            text = file.read(_MAX_AD_BYTES).decode(errors="replace")
    except OSError:
        return ""
    numbers = [
        re.search(rf"^{name}\s*=\s*([0-9]+)\s*$", text, re.MULTILINE | re.IGNORECASE)
        for name in ("ClusterId", "ProcId")
    ]
    return ".".join(found[1] for found in numbers if found is not None)
