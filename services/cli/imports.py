"""Imports without what a library would bring along for a terminal: a worker that starts has to be
at work within a second, on processors that its engine may compute on.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """Within it, `modules` are as if not installed. For what is optional to whoever is imported."""
    hidden = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in modules
    }
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)
