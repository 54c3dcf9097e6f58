"""Chooses which engines to stop to free memory: those that are cheapest to lose."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The chance that an idle context without claims is needed again halves in this time.
_HALF_LIFE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that no worker is attached to."""

    name: str
    memory_bytes: int
    """The memory that stopping it would free."""
    demand: int
    """Claims waiting for its context."""
    start_seconds: float
    """How long its next start would take."""
    idle_seconds: float
    """Since its last use."""
    asleep: bool = False
    """An engine asleep holds little memory and can only be stopped."""

    @property
    def loss_seconds(self) -> float:
        """The expected cost of losing it: the time of a start times the chance of needing one."""
        wanted = 1.0 if self.demand else 0.5 ** (self.idle_seconds / _HALF_LIFE_SECONDS)
        return wanted * self.start_seconds


def cheapest_to_lose(candidates: Iterable[Candidate], missing_bytes: int) -> Sequence[Candidate]:
    """Candidates that together free at least `missing_bytes`, the cheapest first; all of them if
    that is not enough. A candidate is left out again if the others free enough without it.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda c: (c.loss_seconds, c.demand, c.name)):
        if freed >= missing_bytes:
            break
        chosen.append(candidate)
        freed += candidate.memory_bytes
    for candidate in reversed(chosen[:-1]):  # the most expensive first
        if freed - candidate.memory_bytes >= missing_bytes:
            chosen.remove(candidate)
            freed -= candidate.memory_bytes
    return chosen
