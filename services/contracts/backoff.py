"""Exponential backoff with jitter, for every retry."""

import random


def backoff_seconds(failures: int, *, first_seconds: float, longest_seconds: float) -> float:
    """Seconds to wait after this many failures in a row (1 is the first).

    The bound doubles with each failure up to `longest_seconds`. Half of it is fixed and half is
    random, so that processes that failed together do not retry together ("equal jitter"; Brooker,
    Exponential Backoff And Jitter, AWS Architecture Blog, 2015).
    """
    bound = min(longest_seconds, first_seconds * 2.0 ** min(max(failures, 1) - 1, 32))
    return bound / 2 + random.uniform(0, bound / 2)
