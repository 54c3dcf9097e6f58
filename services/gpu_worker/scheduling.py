"""Which context a worker should serve next: a pure function of the directory and of the worker.

docs/taking.md has the formulas, the constants with their reasons, and a worked example.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from sys import float_info

from services.contexts.caches import EngineCaches
from services.contexts.fork_server_client import has_fork_server
from services.contexts.plan import EnginePlan
from services.contexts.records import live_records
from services.contracts import ContextDemand, ContextSpec, Settings
from services.contracts.backoff import backoff_seconds
from services.contracts.control import CONTROL_UPDATE_SECONDS
from services.contracts.errors import KeeperError, KeepwarmError
from services.node.device import Device
from services.node.runtime_dir import open_runtime_dir

COLD_SECONDS = 60.0
"""Until a context is ready, on a node where none was ever started."""
CLAIMS_PER_SECOND = 100.0
"""A worker's speed before it was measured. Too high a guess makes it slower to move."""
PATIENCE_SECONDS = CONTROL_UPDATE_SECONDS
"""An empty queue is believed after this long: the directory is a notice old."""
SHORTEST_STAY_SECONDS = 10.0
STAY_COSTS = 3.0
"""A worker with work stays this many times what the switch costs: at most a quarter of its time
goes into getting ready."""
BETTER_BY = 2.0
"""So many times more work than here must wait elsewhere, for each worker, to leave work."""
FIRST_NOTICES = 5
"""Where nobody is, somebody goes after so many notices on average, however far it is."""

_OTHER_DIGITS = 1_009
# From host memory back to the GPU: a second for each few GiB of weights.
_WAKE_SECONDS = 5.0
# A context that failed here is tried again after about as long as the fault has lasted: a hiccup
# costs seconds, and a model that is missing for good a try each quarter or half of an hour.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 1800.0


@dataclass(frozen=True, slots=True)
class Situation:
    """What a worker knows of itself.

    `here` is the context that it serves, None where it serves none yet. `warm` maps context ids to
    the seconds until they are ready on this node: about 0 for a warm one, the time to wake one that
    sleeps, what it takes to bring back one that was here before. `draw`, in [0, 1), is this
    worker's lot for this notice: drawn anew for each.
    """

    here: str | None
    queue_empty: bool
    idle_seconds: float
    """How long its own queue gave nothing, or how long it has had no context."""
    since_ready_seconds: float
    """How long the present context has been ready."""
    claims_per_second: float | None
    """As measured on the present context."""
    warm: Mapping[str, float]
    draw: float


@dataclass(frozen=True, slots=True)
class Stay:
    """Go on with the present context, or with none. `reason` is for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class Switch:
    """Serve another context. `reason` is for the log."""

    context: ContextSpec
    reason: str


@dataclass(frozen=True, slots=True)
class _Place:
    """A context with claims ready, as this worker sees it."""

    context: ContextSpec
    ready: int
    workers: int
    cost_seconds: float
    work_seconds: float
    """How long the claims would last, if this worker joined those that are there."""
    share: float
    """Of the fleet, by ready claims."""
    useful: float
    """How many workers have work there for longer than it costs to come."""

    @property
    def deficit(self) -> float:
        """How many workers it should get. One, where nobody is: every run has to end."""
        wanted = min(self.share, self.useful)
        return max(wanted, 1.0) if self.workers == 0 else max(wanted - self.workers, 0.0)

    @property
    def notices(self) -> float:
        """Over how many notices those who move are spread; see `_is_needed_elsewhere`."""
        spread = 2 * self.cost_seconds / CONTROL_UPDATE_SECONDS
        if self.workers == 0:
            spread = min(spread, FIRST_NOTICES * self.deficit)
        return max(1.0, spread)


def next_context(directory: Sequence[ContextDemand], worker: Situation) -> Stay | Switch:
    """Stay, or switch to the context where this worker is wanted most."""
    rate = worker.claims_per_second or CLAIMS_PER_SECOND
    ready = {line.context.context_id: line.claims_ready for line in directory}
    workers = {line.context.context_id: line.workers_warm for line in directory}
    if worker.here is not None:  # whoever decides is here, whatever the last notice says
        workers[worker.here] = max(1, workers.get(worker.here, 0))
    per_claim = sum(workers.values()) / max(1, sum(ready.values()))
    places = [
        _place(line, worker, rate, share=per_claim * line.claims_ready)
        for line in directory
        if line.claims_ready > 0 and line.context.context_id != worker.here
    ]
    if not places:
        return Stay("no claims wait elsewhere")
    if worker.here is None:
        # Where to is drawn by other digits of the lot than whether.
        where = worker.draw * _OTHER_DIGITS % 1.0
        return _join([place for place in places if _pays(place, worker)], where)
    if not worker.queue_empty:
        work_here = ready.get(worker.here, 0) / (rate * workers[worker.here])
        places = [place for place in places if _is_better(place, work_here)]
    elif worker.idle_seconds < PATIENCE_SECONDS:
        return Stay("the queue has only just become empty")
    else:
        places = [place for place in places if _pays(place, worker)]
    if not places:
        return Stay("no work elsewhere is worth the switch")
    places = [place for place in places if _stayed_long_enough(place, worker)]
    if not places:
        return Stay("this context has not been here for long")
    surplus = {
        context_id: max(0.0, count - per_claim * ready.get(context_id, 0))
        for context_id, count in workers.items()
    }
    leaving = surplus[worker.here] / workers[worker.here]
    return _move(places, leaving, sum(surplus.values()), worker.draw)


def _place(line: ContextDemand, worker: Situation, rate: float, *, share: float) -> _Place:
    cost = worker.warm.get(line.context.context_id, COLD_SECONDS)
    return _Place(
        context=line.context,
        ready=line.claims_ready,
        workers=line.workers_warm,
        cost_seconds=cost,
        work_seconds=line.claims_ready / (rate * (line.workers_warm + 1)),
        share=share,
        useful=line.claims_ready / rate / cost if cost > 0 else inf,
    )


def _pays(place: _Place, worker: Situation) -> bool:
    """For a worker with nothing to do. Where nobody is, it pays once as much time was lost idle as
    the switch costs: rent, then buy. One that has no context at all loses nothing by going but the
    start, so it buys after a part of that time, drawn anew: of many that wait, one is soon there.
    """
    if place.work_seconds > place.cost_seconds:
        return True
    patience = place.cost_seconds * (worker.draw if worker.here is None else 1.0)
    return place.workers == 0 and worker.idle_seconds >= patience


def _is_better(place: _Place, work_here_seconds: float) -> bool:
    """For a worker with work: enough to come for, and much more than here."""
    return place.work_seconds > BETTER_BY * work_here_seconds + place.cost_seconds


def _stayed_long_enough(place: _Place, worker: Situation) -> bool:
    least = SHORTEST_STAY_SECONDS
    if not worker.queue_empty:
        least = max(least, STAY_COSTS * place.cost_seconds)
    return worker.since_ready_seconds >= least


def _join(places: Sequence[_Place], draw: float) -> Stay | Switch:
    """A worker without a context draws one: by ready claims, for each second until it is ready."""
    if not places:
        return Stay("no work is worth a start")
    weighted = [
        (place, place.ready / (CONTROL_UPDATE_SECONDS + place.cost_seconds)) for place in places
    ]
    place, _ = _drawn(weighted, draw)
    return _switch(place)


def _move(places: Iterable[_Place], leaving: float, surplus: float, draw: float) -> Stay | Switch:
    """The fleet's surplus is dealt to what others lack, the soonest ready first; this worker draws
    whether it is one of those who go, and where.
    """
    dealt: list[tuple[_Place, float]] = []
    left = surplus
    for place in sorted(places, key=lambda place: (place.cost_seconds, -place.ready)):
        given = min(place.deficit, left)
        if given > 0:
            dealt.append((place, given))
            left -= given
    if leaving <= 0 or not dealt:
        return Stay("the workers are where the claims are")
    chance = min(1.0, leaving * (surplus - left) / surplus)
    place, lot = _drawn(dealt, draw)
    if not _is_needed_elsewhere(place, chance, lot):
        return Stay(f"others go, at a chance of {chance:.2f}")
    return _switch(place)


def _is_needed_elsewhere(place: _Place, chance: float, lot: float) -> bool:
    """Whether a worker that goes with this chance goes now.

    Those who move are out of sight until they are ready, and as many more would be called at each
    notice meanwhile. So the chance is that of going within twice the time that it takes.
    """
    staying: float = (1 - chance) ** (1 / place.notices)
    return lot < 1 - staying


def _drawn(weighted: Sequence[tuple[_Place, float]], draw: float) -> tuple[_Place, float]:
    """The place on which the draw falls, by weight, and how far into it: another draw in [0, 1)."""
    position = draw * sum(weight for _, weight in weighted)
    for place, weight in weighted[:-1]:
        if position < weight:
            return place, position / weight
        position -= weight
    place, weight = weighted[-1]
    return place, min(position / weight, 1 - float_info.epsilon)


def _switch(place: _Place) -> Switch:
    return Switch(
        place.context,
        f"{place.work_seconds:,.0f} s of work wait there, {place.workers} workers are there, and "
        f"it is ready in {place.cost_seconds:,.1f} s",
    )


class StartupEstimates:
    """What is warm here, what starts took before, and what could not be had here of late."""

    def __init__(
        self, device: Device, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._settings = settings
        self._directory = open_runtime_dir(settings.runtime_dir)
        self._caches = EngineCaches(settings.cache_dir)
        self._clock = clock
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def failed(self, context_id: str, error: KeepwarmError) -> float:
        """It could not be had, or not be kept. The seconds for which it is left to other nodes.

        A keeper that cannot be used is no fault of the context's: its pause does not grow.
        """
        failures = 1
        if not isinstance(error, KeeperError):
            failures = self._failures[context_id] = self._failures.get(context_id, 0) + 1
        pause = backoff_seconds(
            failures,
            first_seconds=_FIRST_PAUSE_SECONDS,
            longest_seconds=_LONGEST_PAUSE_SECONDS,
        )
        self._not_before[context_id] = self._clock() + pause
        return pause

    def answered(self, context_id: str) -> None:
        """It works here: whatever failed before is forgotten."""
        self._failures.pop(context_id, None)

    def may_try(self, context_id: str) -> bool:
        """False for a while after it has failed here."""
        return self._clock() >= self._not_before.get(context_id, 0.0)

    def seconds(self, contexts: Iterable[ContextSpec]) -> dict[str, float]:
        """By context id. One that was never here is taken to start like the slowest of those that
        were, and to be fetched first; on a node without any, nothing is known of it, and it is left
        out. Where no template is, imports come on top.
        """
        live = {record.name: record for record in live_records(self._directory)}
        starts = self._caches.recall_all()
        imports = max((start.phases.imports or 0.0 for start in starts.values()), default=0.0)
        if has_fork_server(self._directory):
            imports = 0.0
        slowest = max(
            (
                start.restart_seconds + max(imports, start.phases.fetch or 0.0)
                for start in starts.values()
            ),
            default=None,
        )
        known: dict[str, float] = {}
        for spec in contexts:
            name = EnginePlan.of(spec, self._device, self._settings).name
            record, past = live.get(name), starts.get(name)
            if record is not None and record.state in ("warm", "asleep"):
                known[spec.context_id] = 0.0 if record.state == "warm" else _WAKE_SECONDS
            elif past is not None:
                known[spec.context_id] = past.restart_seconds + imports
            elif slowest is not None:
                known[spec.context_id] = slowest
        return known
