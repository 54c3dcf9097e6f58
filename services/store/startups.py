"""How long a run's context took to be ready, as workers reported during the run."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, median

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, func, select

from services.contracts import StartupPhases
from services.store.schema import deliveries, runs, startups


class ColdStarts(BaseModel):
    """Engines that were started on one kind of device.

    `phases` are means over the starts that measured the phase; None if none did.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    count: int
    median_seconds: float
    longest_seconds: float
    phases: StartupPhases


class Attaches(BaseModel):
    """Workers that attached to an engine which was not started for them."""

    model_config = ConfigDict(frozen=True)

    count: int
    median_seconds: float


class Startups(BaseModel):
    """The startups of a context. `cold` has the devices with the most starts first."""

    model_config = ConfigDict(frozen=True)

    cold: tuple[ColdStarts, ...]
    warm: Attaches | None
    """None if no worker found its context warm."""
    joined: Attaches | None = None
    """Workers that waited for an engine that another started, or that had to wake."""


def startups_of(
    connection: Connection, run_key: int, context_id: str, *, complete: bool
) -> Startups | None:
    """The starts of a run's context that ended during the run; None if there were none.

    A run lasts from its first message until its last verdict, or until now if it is not complete.
    """
    query = select(startups).where(
        startups.c.context_id == context_id,
        startups.c.received_at
        >= select(runs.c.first_seen).where(runs.c.run_key == run_key).scalar_subquery(),
    )
    last = connection.execute(
        select(func.max(deliveries.c.received_at)).where(deliveries.c.run_key == run_key)
    ).scalar()
    if complete and last is not None:
        query = query.where(startups.c.received_at <= last)
    by_device: dict[str, list[tuple[float, StartupPhases]]] = defaultdict(list)
    warm: list[float] = []
    joined: list[float] = []
    for row in connection.execute(query.order_by(startups.c.received_at)):
        phases = StartupPhases(**{name: getattr(row, name) for name in StartupPhases.model_fields})
        if row.warm:
            warm.append(row.seconds)
        elif phases == StartupPhases():
            joined.append(row.seconds)
        else:
            by_device[row.device].append((row.seconds, phases))
    if not by_device and not warm and not joined:
        return None
    most_first = sorted(by_device.items(), key=lambda item: -len(item[1]))
    return Startups(
        cold=tuple(_cold(device, starts) for device, starts in most_first),
        warm=_attaches(warm),
        joined=_attaches(joined),
    )


def _attaches(seconds: Sequence[float]) -> Attaches | None:
    return Attaches(count=len(seconds), median_seconds=median(seconds)) if seconds else None


def _cold(device: str, starts: Sequence[tuple[float, StartupPhases]]) -> ColdStarts:
    seconds = [taken for taken, _ in starts]
    means = {}
    for name in StartupPhases.model_fields:
        measured = [value for _, phases in starts if (value := getattr(phases, name)) is not None]
        means[name] = fmean(measured) if measured else None
    return ColdStarts(
        device=device,
        count=len(starts),
        median_seconds=median(seconds),
        longest_seconds=max(seconds),
        phases=StartupPhases(**means),
    )
