"""Estimates the demand for contexts: how many claims each has waiting, and how many workers.

The broker knows how many messages wait, the store what is done, and heartbeats which workers there
are. Nothing else is stored: a restarted collector computes the same demand from these three.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from sqlalchemy import Row, func, select

from services.broker import Consumer, Counts
from services.collector.fleet import Fleet
from services.contracts import ContextDemand, ContextSpec, Settings, topology
from services.contracts.control import MAX_CONTEXTS, MAX_CONTEXTS_BYTES
from services.store.schema import deliveries, outcomes, runs, submissions
from services.store.store import Store

# Between two counts, the outcomes of each commit are added. A count corrects what that misses:
# other collectors on this store, dead claims that came twice, dead claims that a person retried.
_RECOUNT_SECONDS = 60.0
# A run of 10 million claims has some 150,000 deliveries to sum, which takes a tenth of a second. A
# store with a hundred such runs is counted over several updates, the latest run first.
_COUNTING_SECONDS = 0.25


@dataclass
class _Progress:
    """The progress of one run: counted at `counted_at`, plus the commits since."""

    context: ContextSpec
    submission_count: int
    outcomes: int
    batch_claims: float | None
    """Mean claims per message; None before the first verdicts."""
    counted_at: float
    exact: bool = True


@dataclass
class _OpenClaims:
    """The claims that the unfinished runs of one context still wait for."""

    remaining: int = 0
    all_sent: bool = True
    batch_claims: float | None = None


class DemandEstimator:
    """Computes the demand for each control update, from the wanted runs and the latest counts of
    the broker and the workers.
    """

    def __init__(self, store: Store, settings: Settings, fleet: Fleet) -> None:
        self._store = store
        self._settings = settings
        self._fleet = fleet
        self._progress: dict[str, _Progress] = {}
        self._open_claims: dict[str, _OpenClaims] = {}
        # The queues that were counted last; one that is not in `_counts` does not exist.
        self._counted: frozenset[str] = frozenset()
        self._counts: Counts = {}
        # The context of each run that has a cancelled submission.
        self._cancelled: dict[str, str] = {}
        self._deadline: float | None = None
        self.unfinished: dict[str, str] = {}
        """The context of each wanted run that is not complete, as of the last update."""
        self.counted_at = -inf
        """When the queues were last counted, by the monotonic clock."""
        self.contexts: tuple[ContextDemand, ...] = ()
        """The result of the last `update`."""

    def note(self, gained: Mapping[str, int]) -> None:
        """Add committed outcomes, by run."""
        for run_id, count in gained.items():
            if run_id in self._progress:
                self._progress[run_id].outcomes += count
                self._progress[run_id].exact = False

    @property
    def counts(self) -> Counts:
        """The lengths of the queues, as of the broker's last answer."""
        return self._counts

    def request_counts(self, link: Consumer, also: Iterable[str] = ()) -> None:
        """Ask the broker to count the claims queues, and `also`. Never waits."""
        contexts = dict.fromkeys((*self._open_claims, *self._cancelled.values()))
        queues = [*also, *[*map(topology.claims_queue, contexts)][:MAX_CONTEXTS]]

        def on_counts(counts: Counts) -> None:
            self._counts, self._counted = counts, frozenset(queues)
            self.counted_at = time.monotonic()

        link.request_counts(queues, on_counts)

    def settled_runs(self) -> set[str]:
        """Runs with cancelled submissions whose context has no claims left in its queue or at a
        worker.
        """
        if self._counts.get(topology.RETURNS_QUEUE, 1):
            return set()
        return self.without_claims(self._cancelled)

    def without_claims(self, contexts: Mapping[str, str]) -> set[str]:
        """Those runs (run id -> context id) whose context has no claims in its queue, by the last
        count, and none at a worker.
        """
        held = self._fleet.claims_held()
        return {
            run_id
            for run_id, context_id in contexts.items()
            if (queue := topology.claims_queue(context_id)) in self._counted
            and not self._counts.get(queue)
            and not held[context_id]
        }

    def update(self) -> tuple[ContextDemand, ...]:
        """Compute the demand now, the context with the most claims first. Raises StoreError.

        A context whose queue was not counted yet is left out. The result is empty until all workers
        have had time to send a heartbeat: otherwise a worker would switch to contexts that others
        already serve.
        """
        contexts: dict[str, ContextSpec] = {}
        self._open_claims, self._cancelled = {}, {}
        self._deadline = None
        self.unfinished = {}
        for row in self._announced_runs():
            progress = self._progress_of(row)
            if progress is not None:
                contexts.setdefault(progress.context.context_id, progress.context)
                if row.cancelled:
                    self._cancelled[row.run_id] = progress.context.context_id
                if row.wanted:
                    self._add_open_claims(row, progress)
        self.contexts = ()
        if not self._fleet.heard_from_all():
            return ()
        most_first = sorted(
            self._estimates(contexts.values()),
            key=lambda demand: (-demand.claims_ready, -demand.claims_in_flight),
        )
        self.contexts = tuple(_fit_in_message(most_first))
        return self.contexts

    def _announced_runs(self) -> list[Row[Any]]:
        """Every announced run, the latest first, and whether a submission of it is active."""
        query = (
            select(
                runs.c.run_key,
                runs.c.run_id,
                runs.c.claims,
                func.count().label("submission_count"),
                (func.count() > func.count(submissions.c.cancelled_at)).label("wanted"),
                func.count(submissions.c.cancelled_at).label("cancelled"),
            )
            .join(submissions, submissions.c.run_key == runs.c.run_key)
            .where(runs.c.run.is_not(None))
            .group_by(runs.c.run_key, runs.c.run_id, runs.c.claims, runs.c.first_seen)
            .order_by(runs.c.first_seen.desc())
        )
        with self._store.transaction() as connection:
            return list(connection.execute(query).all())

    def _progress_of(self, row: Row[Any]) -> _Progress | None:
        """A run's progress, counted if necessary; None if there is no time for that now."""
        known = self._progress.get(row.run_id)
        now = time.monotonic()
        if known is not None and known.submission_count == row.submission_count:
            complete = row.claims is not None and known.outcomes >= row.claims
            # A run that is complete by an exact count is not counted again.
            due = not known.exact if complete else now > known.counted_at + _RECOUNT_SECONDS
            if not due or not row.wanted:
                return known
        if self._deadline is None:
            # Each update counts at least one run, so that all are counted even in a slow store.
            self._deadline = now + _COUNTING_SECONDS
        elif now > self._deadline:
            return known
        counted = self._progress[row.run_id] = self._count(row, known)
        return counted

    def _count(self, row: Row[Any], known: _Progress | None) -> _Progress:
        with self._store.transaction() as connection:
            fresh, verdicts, messages = connection.execute(
                select(
                    func.coalesce(func.sum(deliveries.c.fresh), 0),
                    func.sum(deliveries.c.fresh + deliveries.c.duplicates),
                    func.count(),
                ).where(deliveries.c.run_key == row.run_key)
            ).one()
            dead = connection.execute(
                select(func.count()).where(
                    outcomes.c.run_key == row.run_key, outcomes.c.reason.is_not(None)
                )
            ).scalar_one()
            if known is not None:
                context = known.context
            else:
                text = connection.execute(
                    select(runs.c.run).where(runs.c.run_key == row.run_key)
                ).scalar_one()
                context = ContextSpec.model_validate(json.loads(text)["context"])
        return _Progress(
            context=context,
            submission_count=row.submission_count,
            outcomes=int(fresh) + dead,
            batch_claims=float(verdicts) / messages if messages else None,
            counted_at=time.monotonic(),
        )

    def _add_open_claims(self, row: Row[Any], progress: _Progress) -> None:
        if row.claims is not None and progress.outcomes >= row.claims:
            return
        self.unfinished[row.run_id] = progress.context.context_id
        open_claims = self._open_claims.setdefault(progress.context.context_id, _OpenClaims())
        if row.claims is None:
            open_claims.all_sent = False
        else:
            open_claims.remaining += row.claims - progress.outcomes
        # Of several runs, the latest one with verdicts: its batches are those that wait.
        open_claims.batch_claims = open_claims.batch_claims or progress.batch_claims

    def _estimates(self, contexts: Iterable[ContextSpec]) -> Iterator[ContextDemand]:
        counts = self._counts
        held = self._fleet.claims_held()
        for context in contexts:
            workers = self._fleet.workers_on(context.context_id)
            open_claims = self._open_claims.get(context.context_id)
            messages = counts.get(topology.claims_queue(context.context_id))
            if open_claims is None:
                if not workers:
                    continue
                ready = in_flight = 0
            elif messages is None:
                continue
            else:
                ready, in_flight = self._estimate(open_claims, messages, held[context.context_id])
            yield ContextDemand(
                context=context,
                claims_ready=ready,
                claims_in_flight=in_flight,
                workers_warm=workers,
            )

    def _estimate(self, open_claims: _OpenClaims, messages: int, held: int) -> tuple[int, int]:
        """Claims ready, and claims in flight, of which workers hold `held`.

        The queue was counted a while ago, so the remaining claims outside it may be fewer than the
        workers hold. The claims held do not reduce those ready: a killed worker is still counted
        for a while, and its claims wait for another one.
        """
        batch_claims = open_claims.batch_claims or self._settings.batch_size
        ready = round(messages * batch_claims)
        if not open_claims.all_sent:
            return (
                ready,
                held,
            )  # the number remaining is unknown until the producer sends its totals
        ready = min(ready, open_claims.remaining)
        return ready, max(open_claims.remaining - ready, min(held, open_claims.remaining))


def _fit_in_message(demands: list[ContextDemand]) -> Iterator[ContextDemand]:
    """As many of the first ones as one control update can hold."""
    size = 0
    for demand in demands[:MAX_CONTEXTS]:
        size += len(demand.model_dump_json().encode())
        if size > MAX_CONTEXTS_BYTES:
            return
        yield demand
