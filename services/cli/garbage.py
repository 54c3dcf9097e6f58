"""Settings of Python's cyclic garbage collector for processes with many small objects."""

import gc

_THRESHOLD = 200_000


def expect_many_small_objects() -> None:
    """Collect cycles less often. A transaction's verdicts are tens of thousands of objects without
    cycles, and searching them took half of their decoding time (measured).

    Not for the worker: an HTTP client's requests are cycles, and would accumulate.
    """
    gc.set_threshold(_THRESHOLD)
