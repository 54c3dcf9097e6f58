"""How long this node is ours: what the scheduler, or a setting, says."""

import os
import time

from services.contracts import Settings
from services.contracts.errors import UsageError

_SLURM_END = "SLURM_JOB_END_TIME"
# Between the drain's end and the scheduler's: its clock is not ours.
_MARGIN_SECONDS = 5.0


def seconds_until_drain(settings: Settings) -> float | None:
    """From now to the moment when a drain has to begin; None where nobody set an end.

    The scheduler's wall-clock time is looked at once: later jumps of the clock do not matter.
    Raises UsageError when SLURM_JOB_END_TIME is no time.
    """
    left = settings.walltime_seconds
    if left is None:
        end = os.environ.get(_SLURM_END, "")
        if not end:
            return None
        try:
            left = float(int(end)) - time.time()
        except (ValueError, OverflowError) as error:
            raise UsageError(
                f"{_SLURM_END} is {end!r}, no number of seconds since 1970; unset it, or set "
                "KEEPWARM_WALLTIME_SECONDS"
            ) from error
    return max(0.0, left - settings.grace_seconds - _MARGIN_SECONDS)
