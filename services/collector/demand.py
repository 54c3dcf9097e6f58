"""The directory: which contexts have claims waiting, and how many workers hold them warm.

What is waiting is known to the broker, what is done to the store, and who is there to the workers,
which report it. Nothing here is kept: a collector that starts again makes the same directory from
the three.
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

# Between two counts what each commit gained is added. A count sets right what that misses: other
# collectors on this store, deaths that came twice, dead claims that a person sent again.
_RECOUNT_SECONDS = 60.0
# A run of 10 million claims has some 150,000 deliveries to add up: a tenth of a second. A store
# with a hundred of them is gone through in several looks, the latest run first.
_COUNTING_SECONDS = 0.25


@dataclass
class _Progress:
    """How far one run is: counted at some moment, and moved on with each commit since."""

    context: ContextSpec
    sendings: int
    outcomes: int
    batch_claims: float | None
    """Mean claims a message; None before the first verdicts."""
    counted_at: float
    exact: bool = True


@dataclass
class _Wanted:
    """What the unfinished runs of one context want of it together."""

    left: int = 0
    all_sent: bool = True
    batch_claims: float | None = None


class DemandEstimator:
    """Made anew for each notice, from the runs that are wanted and what broker and workers last
    said.
    """

    def __init__(self, store: Store, settings: Settings, fleet: Fleet) -> None:
        self._store = store
        self._settings = settings
        self._fleet = fleet
        self._progress: dict[str, _Progress] = {}
        self._wanted: dict[str, _Wanted] = {}
        # The queues that the broker told of last; one that is not in the counts is not there.
        self._asked: frozenset[str] = frozenset()
        self._counts: Counts = {}
        # By run with a cancelled submission, its context.
        self._cancelled: dict[str, str] = {}
        self._deadline: float | None = None
        self.unfinished: dict[str, str] = {}
        """By run that is wanted and not complete, its context; as at the last look."""
        self.counted_at = -inf
        """When the broker told how long the queues are, by the monotonic clock."""
        self.lines: tuple[ContextDemand, ...] = ()
        """As it was at the last look."""

    def note(self, gained: Mapping[str, int]) -> None:
        """So many outcomes more, by run, were committed."""
        for run_id, count in gained.items():
            if run_id in self._progress:
                self._progress[run_id].outcomes += count
                self._progress[run_id].exact = False

    @property
    def counts(self) -> Counts:
        """How long the queues were that the broker was asked about last."""
        return self._counts

    def ask(self, link: Consumer, also: Iterable[str] = ()) -> None:
        """Ask the broker about the queues, and some others, for the next look. Never waits."""
        contexts = dict.fromkeys((*self._wanted, *self._cancelled.values()))
        queues = [*also, *[*map(topology.claims_queue, contexts)][:MAX_CONTEXTS]]

        def hear(counts: Counts) -> None:
            self._counts, self._asked = counts, frozenset(queues)
            self.counted_at = time.monotonic()

        link.ask_counts(queues, hear)

    def settled_runs(self) -> set[str]:
        """Runs with cancelled submissions of whose context no claim is with the broker any more, as
        far as it was asked, nor with a worker.
        """
        if self._counts.get(topology.RETURNS_QUEUE, 1):
            return set()
        return self.without_claims(self._cancelled)

    def without_claims(self, contexts: Mapping[str, str]) -> set[str]:
        """Those of these runs, each with its context, of whose context no claim is in the queue, as
        the broker told of it last, nor with a worker.
        """
        held = self._fleet.claims_held()
        return {
            run_id
            for run_id, context_id in contexts.items()
            if (queue := topology.claims_queue(context_id)) in self._asked
            and not self._counts.get(queue)
            and not held[context_id]
        }

    def look(self) -> tuple[ContextDemand, ...]:
        """The directory as it is now, the most wanted context first.

        A wanted context that the broker has not spoken of yet is left out. Empty until all workers
        had the time to report: one that finds the others missing would go to do their work. Raises
        StoreError.
        """
        contexts: dict[str, ContextSpec] = {}
        self._wanted, self._cancelled = {}, {}
        self._deadline = None
        self.unfinished = {}
        for row in self._sent_runs():
            progress = self._progress_of(row)
            if progress is not None:
                contexts.setdefault(progress.context.context_id, progress.context)
                if row.cancelled:
                    self._cancelled[row.run_id] = progress.context.context_id
                if row.wanted:
                    self._want(row, progress)
        self.lines = ()
        if not self._fleet.heard_all():
            return ()
        lines = sorted(
            self._lines(contexts.values()),
            key=lambda line: (-line.claims_ready, -line.claims_in_flight),
        )
        self.lines = tuple(_fitting(lines))
        return self.lines

    def _sent_runs(self) -> list[Row[Any]]:
        """Every announced run, the latest first, and whether one of its sendings is wanted."""
        query = (
            select(
                runs.c.run_key,
                runs.c.run_id,
                runs.c.claims,
                func.count().label("sendings"),
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
        """A run's progress, counted where need be; None where there is no time for it now."""
        known = self._progress.get(row.run_id)
        now = time.monotonic()
        if known is not None and known.sendings == row.sendings:
            complete = row.claims is not None and known.outcomes >= row.claims
            # A complete run stays so, if an exact count says it; it is counted no more.
            due = not known.exact if complete else now > known.counted_at + _RECOUNT_SECONDS
            if not due or not row.wanted:
                return known
        if self._deadline is None:
            # Each look counts one: a slow store's runs, too, are counted some day.
            self._deadline = now + _COUNTING_SECONDS
        elif now > self._deadline:
            return known
        counted = self._progress[row.run_id] = self._count(row, known)
        return counted

    def _count(self, row: Row[Any], known: _Progress | None) -> _Progress:
        with self._store.transaction() as connection:
            fresh, answered, messages = connection.execute(
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
            sendings=row.sendings,
            outcomes=int(fresh) + dead,
            batch_claims=float(answered) / messages if messages else None,
            counted_at=time.monotonic(),
        )

    def _want(self, row: Row[Any], progress: _Progress) -> None:
        if row.claims is not None and progress.outcomes >= row.claims:
            return
        self.unfinished[row.run_id] = progress.context.context_id
        wanted = self._wanted.setdefault(progress.context.context_id, _Wanted())
        if row.claims is None:
            wanted.all_sent = False
        else:
            wanted.left += row.claims - progress.outcomes
        # Of several runs the latest that knows: it is the one whose batches wait.
        wanted.batch_claims = wanted.batch_claims or progress.batch_claims

    def _lines(self, contexts: Iterable[ContextSpec]) -> Iterator[ContextDemand]:
        counts = self._counts
        held = self._fleet.claims_held()
        for context in contexts:
            workers = self._fleet.workers_on(context.context_id)
            wanted = self._wanted.get(context.context_id)
            messages = counts.get(topology.claims_queue(context.context_id))
            if wanted is None:
                if not workers:
                    continue
                ready = in_flight = 0
            elif messages is None:
                continue
            else:
                ready, in_flight = self._estimate(wanted, messages, held[context.context_id])
            yield ContextDemand(
                context=context,
                claims_ready=ready,
                claims_in_flight=in_flight,
                workers_warm=workers,
            )

    def _estimate(self, wanted: _Wanted, messages: int, held: int) -> tuple[int, int]:
        """Claims that are ready, and claims in flight, of which workers have `held` in hand.

        The queue was counted a while ago, so what is left without it may be less than workers say
        that they hold. What is ready is not made smaller by their word: a worker that was killed
        is still believed for a while, and its claims wait for somebody else.
        """
        batch_claims = wanted.batch_claims or self._settings.batch_size
        ready = round(messages * batch_claims)
        if not wanted.all_sent:
            return ready, held  # until a producer has told its totals, nobody knows what is left
        ready = min(ready, wanted.left)
        return ready, max(wanted.left - ready, min(held, wanted.left))


def _fitting(lines: list[ContextDemand]) -> Iterator[ContextDemand]:
    """As many as a notice holds, from the first on."""
    size = 0
    for line in lines[:MAX_CONTEXTS]:
        size += len(line.model_dump_json().encode())
        if size > MAX_CONTEXTS_BYTES:
            return
        yield line
