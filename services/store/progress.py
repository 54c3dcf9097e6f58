"""The progress of runs."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Row, bindparam, case, func, select

from services.contracts import INVALID, ContextSpec, Run
from services.contracts.errors import StoreError
from services.contracts.proofs import ClaimsDigest, Positions
from services.contracts.runs import InputSummary
from services.store.label_mass import LowMass, low_mass
from services.store.schema import (
    deliveries,
    outcomes,
    run_counts,
    runs,
    submissions,
    verdict_counts,
)
from services.store.store import Store

_RATE_WINDOW_SECONDS = 60.0
_CHUNK_ROWS = 10_000

_of_run = deliveries.c.run_key == bindparam("run_key")
_COUNTED_RUNS = select(
    *(column for column in runs.columns if column.name not in ("input", "positions")),
    *(column for column in run_counts.columns if column.name != "run_key"),
    # NULL without submissions.
    select(func.min(case((submissions.c.cancelled_at.is_(None), 0), else_=1)))
    .where(submissions.c.run_key == runs.c.run_key)
    .scalar_subquery()
    .label("all_cancelled"),
).join(run_counts, run_counts.c.run_key == runs.c.run_key)
_BY_LABEL = select(verdict_counts).where(verdict_counts.c.run_key == bindparam("run_key"))
_last = select(func.max(deliveries.c.received_at)).where(_of_run).scalar_subquery()
_RECENT = select(
    func.min(deliveries.c.received_at).label("first"),
    func.max(deliveries.c.received_at).label("last"),
    func.max(case((deliveries.c.fresh > 0, deliveries.c.engine_seconds), else_=0.0)).label(
        "engine_seconds"
    ),
    func.sum(deliveries.c.fresh).label("fresh"),
).where(_of_run, deliveries.c.received_at > _last - _RATE_WINDOW_SECONDS)
# The next worker each time, by the index, because `count(distinct)` would read every message.
# https://wiki.postgresql.org/wiki/Loose_indexscan
_first_worker = select(func.min(deliveries.c.worker_id).label("worker_id")).where(_of_run)
_worker = _first_worker.cte("worker", recursive=True)
_next_worker = _first_worker.where(deliveries.c.worker_id > _worker.c.worker_id)
_worker = _worker.union_all(
    select(_next_worker.scalar_subquery()).where(_worker.c.worker_id.is_not(None))
)
_WORKERS = select(func.count(_worker.c.worker_id))


class RunStatus(BaseModel):
    """A run's progress. `total` and `eta_seconds` are None until the producer has sent everything.

    `claims_per_second` is over the last minute with verdicts.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    source: str | None
    model: str | None
    context_id: str | None
    prompt: str | None
    total: int | None
    done: int
    dead: int
    rejected: int | None
    repeated: int | None
    duplicates: int
    """Duplicate verdicts, which were ignored: the first one stays."""
    returned: int
    """Claims that workers returned unfinished, without loss of work."""
    lost_work: int
    """Claims answered by a worker that was not the first to receive them: an upper bound of those
    computed again because a worker was lost.
    """
    verdicts: dict[str, int]
    """By label."""
    judged: int
    """Claims with a verdict whose gold label is known."""
    correct: int
    """Of these, the verdicts that agree with it."""
    claims_per_second: float
    eta_seconds: float | None
    workers_seen: int
    complete: bool
    proven: bool | None = None
    """Whether the outcomes' digest is that of the run's claims, once there are as many outcomes as
    claims. None before, and always if an older producer announced no digest."""
    nowhere_since: float | None = None
    """Since when (Unix time) its claims without an outcome have been in no queue and at no worker.
    """
    cancelled: bool
    low_mass: LowMass | None = None
    """Set if the label words have almost no probability, so that the verdicts mean little."""


@dataclass(frozen=True)
class KnownRun:
    """A run in the store; `run` is None until it is announced."""

    run_key: int
    run_id: str
    run: Run | None
    input: InputSummary | None = None

    @classmethod
    def of(cls, row: Row[Any]) -> "KnownRun":
        return cls(
            row.run_key,
            row.run_id,
            Run.model_validate_json(row.run) if row.run else None,
            InputSummary.model_validate_json(row.input) if row.input else None,
        )


def run_statuses(store: Store, most: int | None = None) -> list[RunStatus]:
    """Every run in the store, or the `most` latest ones; the latest first."""
    with store.transaction() as connection:
        query = _COUNTED_RUNS.order_by(runs.c.first_seen.desc()).limit(most)
        return [_status(connection, row) for row in connection.execute(query).all()]


def run_status(store: Store, run_id: str) -> RunStatus | None:
    """The status of one run; None if the store does not have it."""
    with store.transaction() as connection:
        query = _COUNTED_RUNS.where(runs.c.run_id == run_id)
        row = connection.execute(query).one_or_none()
        return None if row is None else _status(connection, row)


def known_runs(store: Store) -> list[KnownRun]:
    """Every run in the store, the latest first, without computing its progress."""
    with store.transaction() as connection:
        return [
            KnownRun.of(row)
            for row in connection.execute(select(runs).order_by(runs.c.first_seen.desc()))
        ]


def find_run(store: Store, wanted: str) -> KnownRun:
    """The run whose id is, or starts with, `wanted`. Raises StoreError that lists the runs."""
    known = known_runs(store)
    matching = [run for run in known if run.run_id == wanted] or [
        run for run in known if run.run_id.startswith((wanted, f"run-{wanted}"))
    ]
    if len(matching) != 1:
        listed = ", ".join(run.run_id for run in matching or known[:10]) or "no runs"
        what = "several runs start" if matching else "no run starts"
        raise StoreError(f"{what} with {wanted!r}; the store has {listed}")
    return matching[0]


def _status(connection: Connection, row: Row[*tuple[Any, ...]]) -> RunStatus:
    """Reads a few rows for each label and worker, and the messages of a minute, at any size."""
    this = {"run_key": row.run_key}
    counted = connection.execute(_BY_LABEL, this).all()
    done = sum(each.verdicts for each in counted)
    rate = _rate(connection.execute(_RECENT, this).one())
    left = None if row.claims is None else row.claims - done - row.dead
    run = json.loads(row.run) if row.run else None
    proven = None
    if left is not None and left <= 0 and None not in (row.digest, row.high):
        proven = str(ClaimsDigest(row.high, row.low)) == row.digest
    complete = left is not None and left <= 0 and proven is not False
    labels = (*(label["name"] for label in run["prompt"]["labels"]), INVALID) if run else ()
    return RunStatus(
        run_id=row.run_id,
        source=run and run["source"],
        model=run and run["context"]["model"],
        context_id=run and ContextSpec.model_validate(run["context"]).context_id,
        prompt=run and run["prompt"]["name"],
        total=row.claims,
        done=done,
        dead=row.dead,
        rejected=row.rejected,
        repeated=row.repeated,
        duplicates=row.duplicates,
        returned=row.returned,
        lost_work=row.lost_work,
        verdicts=dict.fromkeys(labels, 0) | {each.label: each.verdicts for each in counted},
        judged=sum(each.judged for each in counted),
        correct=sum(each.correct for each in counted),
        claims_per_second=round(rate, 2),
        eta_seconds=None if left is None or rate == 0 else round(left / rate, 1),
        workers_seen=connection.execute(_WORKERS, this).scalar_one(),
        complete=complete,
        proven=proven,
        nowhere_since=None if complete else row.nowhere_since,
        cancelled=row.all_cancelled == 1,
        low_mass=low_mass(connection, row.run_key, complete=complete),
    )


def missing_records(store: Store, run_id: str, most: int) -> list[tuple[int, int]] | None:
    """The records of the input, from 1, whose claims have no outcome: the first and last record of
    each range, at most `most` ranges. Reads every outcome of the run. None if the producer did not
    announce which records are claims.
    """
    with store.transaction() as connection:
        row = connection.execute(select(runs).where(runs.c.run_id == run_id)).one_or_none()
        if row is None or row.positions is None:
            return None
        missing = Positions.of_text(row.positions)
        found = connection.execute(
            select(outcomes.c.position)
            .where(outcomes.c.run_key == row.run_key)
            .execution_options(yield_per=_CHUNK_ROWS)
        )
        for some in found.scalars().partitions():
            missing.discard(some)
    return [(first + 1, last + 1) for first, last in missing.ranges(most)]


def _rate(recent: Row[*tuple[Any, ...]]) -> float:
    """Claims per second in the last window, which includes the first message's engine time."""
    if recent.last is None:
        return 0.0
    seconds = recent.last - recent.first + recent.engine_seconds
    return float(recent.fresh) / seconds if seconds > 0 else 0.0
