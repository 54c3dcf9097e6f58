"""Dead claims: list them, reopen them for a retry, or drop them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, or_, select, update

from services.contracts import INVALID, Claim, DeadReason
from services.store.progress import KnownRun
from services.store.run_counts import RunCounts
from services.store.schema import is_dead, outcomes, runs
from services.store.store import Store


@dataclass(frozen=True)
class DeadRow:
    """A dead claim in the store. `death` distinguishes it from a later death of the same claim."""

    run_key: int
    run_id: str
    claim: Claim
    reason: DeadReason
    detail: str
    failures: int
    death: int


def dead_claims(
    store: Store, run: KnownRun | None = None, claim_ids: Sequence[str] = ()
) -> list[DeadRow]:
    """Dead claims that were not dropped, in input order; of one run, of some ids, or all."""
    query = (
        select(runs.c.run_id, outcomes)
        .join(runs, runs.c.run_key == outcomes.c.run_key)
        .where(is_dead, outcomes.c.dropped.is_(False))
        .order_by(runs.c.first_seen.desc(), outcomes.c.position)
    )
    if run is not None:
        query = query.where(outcomes.c.run_key == run.run_key)
    if claim_ids:
        query = query.where(outcomes.c.claim_id.in_(claim_ids))
    with store.transaction() as connection:
        return [
            DeadRow(
                run_key=row.run_key,
                run_id=row.run_id,
                claim=Claim(
                    claim_id=row.claim_id,
                    position=row.position,
                    text=row.claim,
                    evidence=row.evidence,
                    gold=row.gold,
                ),
                reason=DeadReason(row.reason),
                detail=row.detail,
                failures=row.failures or 0,
                death=row.delivery_key,
            )
            for row in connection.execute(query)
        ]


def unanswered_claims(store: Store, known: KnownRun, kinds: Collection[str]) -> frozenset[str]:
    """Ids of the run's claims whose verdict is INVALID (`invalid`), or that are dead (`dead`)."""
    wanted = []
    if "invalid" in kinds:
        wanted.append(outcomes.c.label == INVALID)
    if "dead" in kinds:
        wanted.append(outcomes.c.reason.is_not(None))
    query = select(outcomes.c.claim_id).where(outcomes.c.run_key == known.run_key, or_(*wanted))
    with store.transaction() as connection:
        return frozenset(connection.execute(query).scalars())


def drop_dead(store: Store, dead: Sequence[DeadRow]) -> None:
    """Drop them: they stay dead in the results, but are no longer listed."""
    with store.transaction() as connection:
        for row in dead:
            connection.execute(update(outcomes).where(_this(row)).values(dropped=True))


def reopen_dead(store: Store, dead: Sequence[DeadRow]) -> None:
    """Delete their rows, so that the run waits for them again.

    To be called once the broker has their claims. An outcome that came meanwhile is kept.
    """
    counts = RunCounts()
    with store.transaction() as connection:
        for row in dead:
            if connection.execute(delete(outcomes).where(_this(row))).rowcount:
                counts.remove(row.run_key, [row.claim.model_dump() | {"label": None}])
        counts.write(connection)


def _this(row: DeadRow) -> ColumnElement[bool]:
    return and_(
        outcomes.c.run_key == row.run_key,
        outcomes.c.claim_id == row.claim.claim_id,
        outcomes.c.delivery_key == row.death,
        outcomes.c.reason.is_not(None),
    )
