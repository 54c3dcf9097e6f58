"""The time until the scheduler reclaims the node, or a setting's limit ends."""

import os
import time

from services.contracts import Settings
from services.contracts.errors import UsageError

_SLURM_END = "SLURM_JOB_END_TIME"
# Between the end of the drain and the scheduler's limit, because clocks differ.
_MARGIN_SECONDS = 5.0


def seconds_left(settings: Settings) -> float | None:
    """Seconds until the walltime ends; None if nothing sets a limit.

    The wall clock is read once, so later jumps of it have no effect.
    Raises UsageError when SLURM_JOB_END_TIME is not a time.
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
            f"{_SLURM_END} is {end!r}, which is not a number of seconds since 1970; unset it, or "
            "set KEEPWARM_WALLTIME_SECONDS"
        ) from error


def seconds_until_drain(settings: Settings) -> float | None:
    """Seconds until a drain must begin; None without a limit. Raises UsageError."""
    left = seconds_left(settings)
    return None if left is None else max(0.0, left - settings.grace_seconds - _MARGIN_SECONDS)
