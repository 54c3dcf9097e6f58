"""How long this node is ours: what the scheduler, or a setting, says."""

import os
import time

from services.contracts import Settings
from services.contracts.errors import UsageError

_SLURM_END = "SLURM_JOB_END_TIME"
# Between the drain's end and the scheduler's: its clock is not ours.
_MARGIN_SECONDS = 5.0


def seconds_left(settings: Settings) -> float | None:
    """From now to the moment when the node is taken away; None where nobody set an end.

    The scheduler's wall-clock time is looked at once: later jumps of the clock do not matter.
    Raises UsageError when SLURM_JOB_END_TIME is no time.
    """
    if settings.walltime_seconds is not None:
        return settings.walltime_seconds
    end = os.environ.get(_SLURM_END, "")
    if not end:
        return None
    try:
        return max(0.0, float(int(end)) - time.time())
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{_SLURM_END} is {end!r}, no number of seconds since 1970; unset it, or set "
            "KEEPWARM_WALLTIME_SECONDS"
        ) from error


def seconds_until_drain(settings: Settings) -> float | None:
    """From now to the moment when a drain has to begin; None where nobody set an end.

    Raises UsageError, as `seconds_left` does.
    """
    left = seconds_left(settings)
    return None if left is None else max(0.0, left - settings.grace_seconds - _MARGIN_SECONDS)
