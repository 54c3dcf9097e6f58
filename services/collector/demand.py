"""Estimates the demand for contexts: how many claims each has waiting, and how many workers.

The broker knows how many messages wait, the store what is done, and heartbeats which workers there
are. It keeps nothing else: a restarted collector computes the same demand from these three.
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
from services.store.run_counts import verdicts_of_run
from services.store.schema import run_counts, runs, submissions
from services.store.store import Store


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
        self._contexts: dict[int, ContextSpec] = {}
        self._open_claims: dict[str, _OpenClaims] = {}
        # The queues that were counted last; one that is not in `_counts` does not exist.
        self._counted: frozenset[str] = frozenset()
        self._counts: Counts = {}
        # The context of each run that has a cancelled submission.
        self._cancelled: dict[str, str] = {}
        self.unfinished: dict[str, str] = {}
        """The context of each wanted run that is not complete, as of the last update."""
        self.counted_at = -inf
        """When the queues were last counted, by the monotonic clock."""
        self.contexts: tuple[ContextDemand, ...] = ()
        """The result of the last `update`."""

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
        self.unfinished = {}
        for row, context in self._announced_runs():
            contexts.setdefault(context.context_id, context)
            if row.cancelled:
                self._cancelled[row.run_id] = context.context_id
            if row.wanted:
                self._add_open_claims(row, context.context_id)
        self.contexts = ()
        if not self._fleet.heard_from_all():
            return ()
        most_first = sorted(
            self._estimates(contexts.values()),
            key=lambda demand: (-demand.claims_ready, -demand.claims_in_flight),
        )
        self.contexts = tuple(_fit_in_message(most_first))
        return self.contexts

    def _announced_runs(self) -> list[tuple[Row[Any], ContextSpec]]:
        """Every announced run with its counters and its context, the latest first."""
        cancelled = func.count(submissions.c.cancelled_at)
        query = (
            select(
                *(runs.c.run_key, runs.c.run_id, runs.c.claims),
                *(run_counts.c.messages, run_counts.c.duplicates),
                verdicts_of_run.label("verdicts"),
                (verdicts_of_run + run_counts.c.dead).label("outcomes"),
                (func.count() > cancelled).label("wanted"),
                cancelled.label("cancelled"),
            )
            .join(run_counts, run_counts.c.run_key == runs.c.run_key)
            .join(submissions, submissions.c.run_key == runs.c.run_key)
            .where(runs.c.run.is_not(None))
            .group_by(runs.c.run_key, run_counts.c.run_key)
            .order_by(runs.c.first_seen.desc())
        )
        with self._store.transaction() as connection:
            announced = connection.execute(query).all()
            for row in announced:
                if row.run_key not in self._contexts:
                    run = select(runs.c.run).where(runs.c.run_key == row.run_key)
                    text = connection.execute(run).scalar_one()
                    context = ContextSpec.model_validate(json.loads(text)["context"])
                    self._contexts[row.run_key] = context
        return [(row, self._contexts[row.run_key]) for row in announced]

    def _add_open_claims(self, row: Row[Any], context_id: str) -> None:
        if row.claims is not None and row.outcomes >= row.claims:
            return
        self.unfinished[row.run_id] = context_id
        open_claims = self._open_claims.setdefault(context_id, _OpenClaims())
        if row.claims is None:
            open_claims.all_sent = False
        else:
            open_claims.remaining += row.claims - row.outcomes
        if open_claims.batch_claims is None and row.messages:
            # Of several runs, the latest one with verdicts: its batches are those that wait.
            open_claims.batch_claims = float(row.verdicts + row.duplicates) / row.messages

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
        if not open_claims.all_sent:  # the number remaining is not known yet
            return ready, held
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
