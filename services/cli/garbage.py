"""Python's collector of reference cycles, set for processes that hold many small messages."""

import gc

_THRESHOLD = 200_000


def expect_many_small_objects() -> None:
    """Look for cycles less often. A transaction's verdicts are tens of thousands of objects without
    cycles, and looking through them again and again took half of their decoding time (measured).

    Not for the worker: an HTTP client's requests are cycles, and would pile up.
    """
    gc.set_threshold(_THRESHOLD)
