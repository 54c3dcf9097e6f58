"""Which engine goes when there is no room for another: the one that is cheapest to lose."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A context that nobody waits for is half as likely to be wanted again every so many seconds.
_HALF_LIFE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that no worker is attached to."""

    name: str
    memory_bytes: int
    """What its end would free."""
    demand: int
    """Claims that wait for its context."""
    start_seconds: float
    """What it takes to bring it back."""
    idle_seconds: float
    """Since its last use."""
    asleep: bool = False
    """It holds little, and can only end."""

    @property
    def loss_seconds(self) -> float:
        """What losing it is expected to cost: the time of a start, as likely as one is."""
        wanted = 1.0 if self.demand else 0.5 ** (self.idle_seconds / _HALF_LIFE_SECONDS)
        return wanted * self.start_seconds


def cheapest_to_lose(candidates: Iterable[Candidate], missing_bytes: int) -> Sequence[Candidate]:
    """Candidates whose end frees at least `missing_bytes`, the cheapest first; all of them where
    that is not enough. None goes that need not: what a larger one frees anyway spares a smaller.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda c: (c.loss_seconds, c.demand, c.name)):
        if freed >= missing_bytes:
            break
        chosen.append(candidate)
        freed += candidate.memory_bytes
    for candidate in reversed(chosen[:-1]):  # the dearest first
        if freed - candidate.memory_bytes >= missing_bytes:
            chosen.remove(candidate)
            freed -= candidate.memory_bytes
    return chosen
