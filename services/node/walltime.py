"""The walltime: the time until the scheduler reclaims the node, or a setting's limit ends."""

import os
import threading
import time
from collections.abc import Callable

import structlog

from services.contracts import Settings
from services.contracts.errors import UsageError

_SLURM_END = "SLURM_JOB_END_TIME"
# Between the end of the drain and the scheduler's limit, because clocks differ.
_MARGIN_SECONDS = 5.0

log = structlog.get_logger(__name__)


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


def stop_before_walltime(settings: Settings, stop: Callable[[], None]) -> None:
    """Call `stop`, on a thread of its own, when a drain must begin; never without a limit.

    Raises UsageError.
    """
    seconds = seconds_until_drain(settings)
    if seconds is None:
        return

    def drain() -> None:
        log.info("walltime.ending")
        stop()

    log.info("walltime.known", drains_in_seconds=round(seconds))
    timer = threading.Timer(seconds, drain)
    timer.daemon = True
    timer.start()
