"""Hides optional modules from imports: a worker must start within a second, on CPUs that its engine
may be using.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """In this context `modules` are not importable, for libraries to which they are optional."""
    hidden = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in modules
    }
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]  # None: not importable
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)
