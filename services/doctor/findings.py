"""The result of a check of `keepwarm doctor`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from services.contracts import Settings

GIB = 1024**3
RECOMMENDED_FREE_BYTES = 2 * GIB
"""About the size of some models' compile caches, or of a store of a million claims."""


@dataclass(frozen=True)
class Finding:
    """`warning`: it works, but the user should know about it."""

    level: Literal["ok", "warning"]
    message: str


Check = Callable[[Settings], Finding]
"""Raises the error that a service would end with, so that each problem is described once."""


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warning(message: str) -> Finding:
    return Finding("warning", message)
