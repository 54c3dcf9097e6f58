"""Which context a worker serves next: a pure function of the demand and of the worker's state, and
the estimates of start times that it needs.

docs/scheduling.md has the formulas, the constants with their reasons, and a worked example.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from sys import float_info

import structlog

from services.contexts.caches import EngineCaches
from services.contexts.fork_server_client import has_fork_server
from services.contexts.keeper_client import engines
from services.contexts.plan import EnginePlan
from services.contexts.protocol import ContextRecord
from services.contracts import ContextDemand, ContextSpec, Settings
from services.contracts.backoff import backoff_seconds
from services.contracts.control import CONTROL_UPDATE_SECONDS
from services.contracts.errors import KeeperError, KeepwarmError
from services.node.device import Device
from services.node.runtime_dir import open_runtime_dir

log = structlog.get_logger(__name__)

COLD_SECONDS = 60.0
"""Assumed start time of a context on a node that has never started one."""
CLAIMS_PER_SECOND = 100.0
"""Assumed speed of a worker before it is measured. Too high a value delays switches."""
PATIENCE_SECONDS = CONTROL_UPDATE_SECONDS
"""How long the queue must be empty before a switch: demand is up to one update old."""
SHORTEST_STAY_SECONDS = 10.0
STAY_COSTS = 3.0
"""A worker with work stays for this many times the cost of the switch, so at most a quarter of its
time is spent on starts."""
BETTER_BY = 2.0
"""A worker with work leaves only for this many times more work per worker."""
FIRST_UPDATES = 5
"""A context without workers gets one after this many updates on average, whatever its cost."""

_SECOND_DRAW_FACTOR = 1_009
# From host memory back to the GPU: about a second for every few GiB of weights.
_WAKE_SECONDS = 5.0
# A context that failed here is retried after about as long as the failure has lasted: a brief fault
# costs seconds, and a missing model one attempt every 15 to 30 minutes.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 1800.0
# A keeper answers in milliseconds. One that does not is asked again after the pause.
_KEEPER_ANSWER_SECONDS, _KEEPER_PAUSE_SECONDS = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Situation:
    """The state of a worker.

    `here` is the context that it serves, None before the first. `start_seconds` maps context ids to
    the time until they are ready on this node: about 0 if warm, the time to wake one that sleeps,
    or the time to restart one that was here before. `random_draw`, in [0, 1), is drawn anew for
    each control update.
    """

    here: str | None
    queue_empty: bool
    idle_seconds: float
    """How long its queue has been empty, or how long it has had no context."""
    since_ready_seconds: float
    """How long its context has been ready."""
    claims_per_second: float | None
    """As measured on its context."""
    start_seconds: Mapping[str, float]
    random_draw: float


@dataclass(frozen=True, slots=True)
class Stay:
    """Keep the context, or stay without one. `reason` is for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class Switch:
    """Serve another context. `reason` is for the log."""

    context: ContextSpec
    reason: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A context with claims ready, and what it would cost and give this worker."""

    context: ContextSpec
    ready: int
    workers: int
    cost_seconds: float
    work_seconds: float
    """How long the claims would last if this worker joined its workers."""
    share: float
    """Its share of the fleet's workers, in proportion to its ready claims."""
    useful: float
    """How many workers have work there for longer than the start takes."""

    @property
    def deficit(self) -> float:
        """How many more workers it should get; at least one if it has none, for every run has
        to end.
        """
        wanted = min(self.share, self.useful)
        return max(wanted, 1.0) if self.workers == 0 else max(wanted - self.workers, 0.0)

    @property
    def spread_updates(self) -> float:
        """Over how many control updates the workers that move are spread; see `_goes_now`."""
        spread = 2 * self.cost_seconds / CONTROL_UPDATE_SECONDS
        if self.workers == 0:
            spread = min(spread, FIRST_UPDATES * self.deficit)
        return max(1.0, spread)


def next_context(demand: Sequence[ContextDemand], worker: Situation) -> Stay | Switch:
    """Stay, or switch to the context that needs this worker most."""
    rate = worker.claims_per_second or CLAIMS_PER_SECOND
    ready = {entry.context.context_id: entry.claims_ready for entry in demand}
    workers = {entry.context.context_id: entry.workers_warm for entry in demand}
    if worker.here is not None:  # at least this one, whatever the last update says
        workers[worker.here] = max(1, workers.get(worker.here, 0))
    per_claim = sum(workers.values()) / max(1, sum(ready.values()))
    candidates = [
        _candidate(entry, worker, rate, share=per_claim * entry.claims_ready)
        for entry in demand
        if entry.claims_ready > 0 and entry.context.context_id != worker.here
    ]
    if not candidates:
        return Stay("no claims wait elsewhere")
    if worker.here is None:
        # Where to go uses other digits of the draw than whether to go.
        where = worker.random_draw * _SECOND_DRAW_FACTOR % 1.0
        return _join([candidate for candidate in candidates if _pays(candidate, worker)], where)
    if not worker.queue_empty:
        work_here = ready.get(worker.here, 0) / (rate * workers[worker.here])
        candidates = [candidate for candidate in candidates if _is_better(candidate, work_here)]
    elif worker.idle_seconds < PATIENCE_SECONDS:
        return Stay("the queue has only just become empty")
    else:
        candidates = [candidate for candidate in candidates if _pays(candidate, worker)]
    if not candidates:
        return Stay("no work elsewhere is worth the switch")
    candidates = [candidate for candidate in candidates if _stayed_long_enough(candidate, worker)]
    if not candidates:
        return Stay("this context has not been here for long")
    surplus = {
        context_id: max(0.0, count - per_claim * ready.get(context_id, 0))
        for context_id, count in workers.items()
    }
    leave_chance = surplus[worker.here] / workers[worker.here]
    return _move(candidates, leave_chance, sum(surplus.values()), worker.random_draw)


def _candidate(entry: ContextDemand, worker: Situation, rate: float, *, share: float) -> _Candidate:
    cost = worker.start_seconds.get(entry.context.context_id, COLD_SECONDS)
    return _Candidate(
        context=entry.context,
        ready=entry.claims_ready,
        workers=entry.workers_warm,
        cost_seconds=cost,
        work_seconds=entry.claims_ready / (rate * (entry.workers_warm + 1)),
        share=share,
        useful=entry.claims_ready / rate / cost if cost > 0 else inf,
    )


def _pays(candidate: _Candidate, worker: Situation) -> bool:
    """For an idle worker. A context without workers pays once the worker has been idle for as long
    as the switch costs (the ski-rental rule). A worker without any context loses only the start, so
    it goes after a random part of that time: of many that wait, one goes soon.
    """
    if candidate.work_seconds > candidate.cost_seconds:
        return True
    patience = candidate.cost_seconds * (worker.random_draw if worker.here is None else 1.0)
    return candidate.workers == 0 and worker.idle_seconds >= patience


def _is_better(candidate: _Candidate, work_here_seconds: float) -> bool:
    """For a worker with work: worth the switch, and much more work than here."""
    return candidate.work_seconds > BETTER_BY * work_here_seconds + candidate.cost_seconds


def _stayed_long_enough(candidate: _Candidate, worker: Situation) -> bool:
    least = SHORTEST_STAY_SECONDS
    if not worker.queue_empty:
        least = max(least, STAY_COSTS * candidate.cost_seconds)
    return worker.since_ready_seconds >= least


def _join(candidates: Sequence[_Candidate], random_draw: float) -> Stay | Switch:
    """A worker without a context picks one at random, by ready claims per second of start time."""
    if not candidates:
        return Stay("no work is worth a start")
    weighted = [
        (candidate, candidate.ready / (CONTROL_UPDATE_SECONDS + candidate.cost_seconds))
        for candidate in candidates
    ]
    candidate, _ = _pick(weighted, random_draw)
    return _switch(candidate)


def _move(
    candidates: Iterable[_Candidate], leave_chance: float, surplus: float, random_draw: float
) -> Stay | Switch:
    """Assign the fleet's surplus to the contexts with a deficit, the soonest ready first. This
    worker draws whether it moves, and where to.
    """
    assigned: list[tuple[_Candidate, float]] = []
    left = surplus
    for candidate in sorted(
        candidates, key=lambda candidate: (candidate.cost_seconds, -candidate.ready)
    ):
        assigned_workers = min(candidate.deficit, left)
        if assigned_workers > 0:
            assigned.append((candidate, assigned_workers))
            left -= assigned_workers
    if leave_chance <= 0 or not assigned:
        return Stay("the workers are where the claims are")
    chance = min(1.0, leave_chance * (surplus - left) / surplus)
    candidate, remaining_draw = _pick(assigned, random_draw)
    if not _goes_now(candidate, chance, remaining_draw):
        return Stay(f"not drawn to move, at a chance of {chance:.2f}")
    return _switch(candidate)


def _goes_now(candidate: _Candidate, chance: float, remaining_draw: float) -> bool:
    """Whether a worker that moves with this chance moves at this update.

    Workers that move are not counted until they are ready, and each update meanwhile would send as
    many again. So the chance is that of moving within twice the time that the start takes.
    """
    staying: float = (1 - chance) ** (1 / candidate.spread_updates)
    return remaining_draw < 1 - staying


def _pick(
    weighted: Sequence[tuple[_Candidate, float]], random_draw: float
) -> tuple[_Candidate, float]:
    """The candidate that the draw picks, by weight, and the rest of the draw, again in [0, 1)."""
    position = random_draw * sum(weight for _, weight in weighted)
    for candidate, weight in weighted[:-1]:
        if position < weight:
            return candidate, position / weight
        position -= weight
    candidate, weight = weighted[-1]
    return candidate, min(position / weight, 1 - float_info.epsilon)


def _switch(candidate: _Candidate) -> Switch:
    return Switch(
        candidate.context,
        f"{candidate.work_seconds:,.0f} s of work wait there, {candidate.workers} workers are "
        f"there, and it is ready in {candidate.cost_seconds:,.1f} s",
    )


class StartupEstimates:
    """Start times of contexts on this node, and contexts that failed here recently."""

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
        self._ask_keeper_at = 0.0

    def failed(self, context_id: str, error: KeepwarmError) -> float:
        """Record that the context could not be started or kept; return the seconds until a retry.

        A keeper that cannot be used is not the context's fault: that pause does not grow.
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
        """Forget its failures: it works here."""
        self._failures.pop(context_id, None)

    def may_try(self, context_id: str) -> bool:
        """False until its retry is due."""
        return self._clock() >= self._not_before.get(context_id, 0.0)

    def seconds(self, contexts: Sequence[ContextSpec]) -> dict[str, float]:
        """Seconds until each context is ready, by context id. A context that was never here is
        assumed to start like the slowest of those that were, and to be fetched first; on a node
        without any it is left out. Without a fork server, imports are added.
        """
        if not contexts:
            return {}
        live = {record.name: record for record in self._engines()}
        starts = self._caches.last_starts()
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

    def _engines(self) -> Sequence[ContextRecord]:
        """The engines of this node; none while its keeper does not answer."""
        if self._clock() < self._ask_keeper_at:
            return ()
        try:
            return engines(self._directory, _KEEPER_ANSWER_SECONDS)
        except KeeperError as error:
            self._ask_keeper_at = self._clock() + _KEEPER_PAUSE_SECONDS
            log.warning("keeper.no_answer", reason=str(error))
            return ()
