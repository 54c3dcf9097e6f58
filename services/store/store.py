"""The store of runs and outcomes: written in transactions, with each claim of a run once."""

import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, repeat
from typing import Any, Self

from pydantic_core import to_json
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Row,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from services.contracts import (
    Claim,
    ClaimBatch,
    ContextReady,
    DeadClaim,
    Run,
    RunAnnouncement,
    Settings,
    VerdictBatch,
)
from services.contracts.control import MAX_CANCELLED
from services.contracts.errors import StoreError, StoreRefused
from services.contracts.proofs import evidence_number, split_verdict_proof
from services.contracts.runs import InputSummary
from services.contracts.wire import Message
from services.store.database import (
    failure,
    is_read_only,
    is_value_error,
    open_engine,
    redacted,
    require_utf8,
)
from services.store.migrations import schema_version, upgrade, version_error
from services.store.run_counts import COUNTED_COLUMNS, RunCounts, add_missing_digest
from services.store.schema import (
    SCHEMA_VERSION,
    deliveries,
    outcomes,
    run_counts,
    runs,
    startups,
    submissions,
)

_MAX_PARAMETERS = 500
# Within this time workers have sent heartbeats, and messages in transit have arrived.
_CANCELLED_SECONDS = 60.0
_CHUNK_ROWS = 10_000

_OUTCOME_COLUMNS = [column.name for column in outcomes.columns]
_COUNTED_COLUMNS = (*COUNTED_COLUMNS, outcomes.c.delivery_key, outcomes.c.dropped)


@dataclass
class Incoming:
    """The messages to write in one transaction."""

    announcements: list[RunAnnouncement] = field(default_factory=list)
    verdicts: list[VerdictBatch] = field(default_factory=list)
    dead: list[DeadClaim] = field(default_factory=list)
    returned: list[ClaimBatch] = field(default_factory=list)
    startups: list[ContextReady] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Iterable[Message]) -> Self:
        incoming = cls()
        for message in messages:
            match message:
                case RunAnnouncement():
                    incoming.announcements.append(message)
                case VerdictBatch():
                    incoming.verdicts.append(message)
                case DeadClaim():
                    incoming.dead.append(message)
                case ClaimBatch():
                    incoming.returned.append(message)
                case ContextReady():
                    incoming.startups.append(message)
                case _:
                    raise TypeError(f"the store cannot write a {type(message).__name__}")
        return incoming

    def run_ids(self) -> set[str]:
        return {
            *(announcement.run.run_id for announcement in self.announcements),
            *(batch.run_id for batch in self.verdicts),
            *(claim.run_id for claim in self.dead),
        }

    def __len__(self) -> int:
        """The number of outcomes, not of messages."""
        return sum(len(batch.verdicts) for batch in self.verdicts) + len(self.dead)


class Store:
    """A database of runs and their outcomes. Use it as a context manager, or close it.

    Every method raises StoreError, with the next step, if the database fails, and its subclass
    StoreRefused if the database refuses a value.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
        # Compiled to SQL once: SQLAlchemy's handling of parameters would take longer than the
        # database, and these rows need none of it.
        values: dict[str, Any] = {name: bindparam(name) for name in _OUTCOME_COLUMNS}
        insert_outcome = dialect.insert(outcomes).values(values).on_conflict_do_nothing()
        self._insert_outcomes = str(insert_outcome.compile(dialect=engine.dialect))
        self._delete_outcome = delete(outcomes).where(
            outcomes.c.run_key == bindparam("of_run"), outcomes.c.claim_id == bindparam("of_claim")
        )
        self._insert_run = dialect.insert(runs).on_conflict_do_nothing(index_elements=["run_id"])
        self._insert_counts = dialect.insert(run_counts).on_conflict_do_nothing()
        self._insert_submission = dialect.insert(submissions).on_conflict_do_nothing()
        self._update_gold = (
            update(outcomes)
            .where(
                outcomes.c.run_key == bindparam("of_run"),
                outcomes.c.claim_id == bindparam("of_claim"),
            )
            .values(gold=bindparam("new_gold"))
        )
        self._insert_startup = dialect.insert(startups).on_conflict_do_nothing()
        # Wall-clock time that does not jump during this process.
        self._clock_offset = time.time() - time.monotonic()

    @classmethod
    def open(cls, settings: Settings, *, create: bool = True) -> "Store":
        """Open the store, and upgrade its tables; with `create`, create them if there are none.

        Raises StoreError if it cannot be used, cannot store every claim's text or, without
        `create`, has no tables; UsageError if the URL is invalid.
        """
        engine = open_engine(settings, create=create)
        store = cls(engine)
        try:
            with store.transaction() as connection:
                require_utf8(connection)
                reads_only = not create and is_read_only(engine.url)
                version = schema_version(connection)
                if version is None and not create:
                    raise StoreError(
                        f"the store {redacted(engine.url)} has no runs yet; `keepwarm collect` or "
                        "`keepwarm run` with this store adds them"
                    )
                if not reads_only:
                    version = upgrade(connection)
                if version != SCHEMA_VERSION:
                    raise version_error(engine.url, version, reads_only=reads_only)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def name(self) -> str:
        """The database's URL, without a password."""
        return redacted(self._engine.url)

    def close(self) -> None:
        """Close the connections to the database of all threads."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OverflowError, UnicodeError) as error:
            cause = getattr(error, "orig", None) or error
            if is_value_error(cause):
                why = str(cause).strip().splitlines()[0]
                # Only the first line: PostgreSQL's further lines quote the row.
                raise StoreRefused(
                    f"the store {redacted(self._engine.url)} refuses a value: {why}"
                ) from error
            raise StoreError(failure(self._engine.url, cause)) from error

    def write(self, incoming: Incoming) -> int:
        """Write all messages or none, and return how many verdicts were the first of their claims.

        Claims that have a verdict keep it, and further ones are counted as duplicates.
        """
        now = self._now()
        counts = RunCounts()
        dead: defaultdict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
        with self.transaction() as connection:
            # All collectors lock the rows of runs in the same order.
            keys = {run: self._run_key(connection, run, now) for run in sorted(incoming.run_ids())}
            for announcement in sorted(incoming.announcements, key=lambda each: each.run.run_id):
                key = keys[announcement.run.run_id]
                _write_announcement(connection, key, announcement)
                submission = {
                    "submission_id": announcement.submission_id,
                    "run_key": key,
                    "proof_key": announcement.proof_key,
                }
                connection.execute(self._insert_submission.values(submission))
            if keys:
                connection.execute(
                    update(runs)
                    .where(runs.c.run_key.in_(keys.values()), runs.c.nowhere_since.is_not(None))
                    .values(nowhere_since=None)
                )
            for returned in incoming.returned:
                returned_key = _find_run_key(connection, returned.run.run_id)
                if returned_key is not None:
                    counts.change(returned_key, returned=len(returned.claims))
            rows = [
                self._write_verdicts(connection, keys[batch.run_id], batch, now, counts)
                for batch in incoming.verdicts
            ]
            if rows:
                connection.execute(insert(deliveries), rows)
            for claim in incoming.dead:  # the last death of a claim stays
                key = keys[claim.run_id]
                dead[key][claim.claim.claim_id] = _dead_row(key, claim)
            for key, by_id in dead.items():
                self._write_outcomes(connection, key, [*by_id.values()], counts)
            for ready in incoming.startups:
                connection.execute(self._insert_startup.values(_startup_row(ready, now)))
            counts.write(connection)
            for announcement in incoming.announcements:
                if announcement.digest is not None:  # now there is a digest to compare with
                    add_missing_digest(connection, keys[announcement.run.run_id])
        return sum(row["fresh"] for row in rows)

    def finished(self, run_id: str, claim_ids: Sequence[str]) -> set[str]:
        """Those of the ids that have an outcome in the run."""
        return {row.claim_id for row in self._among(run_id, claim_ids, outcomes.c.claim_id)}

    def set_gold(self, run_id: str, golds: Mapping[str, str | None]) -> int:
        """Set the gold labels of claims that have an outcome, and return how many changed."""
        counts = RunCounts()
        changed = []
        with self.transaction() as connection:
            key = _find_run_key(connection, run_id)
            for row in self._rows_among(connection, key, [*golds], *_COUNTED_COLUMNS, lock=True):
                gold = golds[row.claim_id]
                if row.gold == gold:
                    continue
                changed.append({"of_run": key, "of_claim": row.claim_id, "new_gold": gold})
                if key is not None and row.label is not None:
                    counts.replace_gold(key, row.label, row.gold, gold)
            if changed:
                connection.execute(self._update_gold, changed)
                counts.write(connection)
        return len(changed)

    def set_input(self, run_id: str, summary: InputSummary) -> None:
        """Replace the summary of the run's input file."""
        with self.transaction() as connection:
            connection.execute(
                update(runs).where(runs.c.run_id == run_id).values(input=summary.model_dump_json())
            )

    def texts(self, run_id: str, claim_ids: Sequence[str]) -> dict[str, str]:
        """The texts of those claims that have an outcome in the run, by id."""
        rows = self._among(run_id, claim_ids, outcomes.c.claim_id, outcomes.c.claim)
        return {row.claim_id: row.claim for row in rows}

    def _among(
        self, run_id: str, claim_ids: Sequence[str], *columns: Column[Any]
    ) -> Iterator[Row[Any]]:
        """These columns of the outcomes of these claims."""
        with self.transaction() as connection:
            key = _find_run_key(connection, run_id)
            yield from self._rows_among(connection, key, claim_ids, *columns)

    @staticmethod
    def _rows_among(
        connection: Connection,
        key: int | None,
        claim_ids: Sequence[str],
        *columns: Column[Any],
        lock: bool = False,
    ) -> Iterator[Row[Any]]:
        for start in range(0, len(claim_ids), _MAX_PARAMETERS):
            query = select(*columns).where(
                outcomes.c.run_key == key,
                outcomes.c.claim_id.in_(claim_ids[start : start + _MAX_PARAMETERS]),
            )
            yield from connection.execute(query.with_for_update() if lock else query).all()

    def is_active(self, submission_id: str) -> bool | None:
        """Whether a submission is announced and not cancelled; None if it was not announced."""
        query = select(submissions).where(submissions.c.submission_id == submission_id)
        with self.transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else row.cancelled_at is None

    def submission(self, submission_id: str) -> tuple[Run, str | None] | None:
        """The announced run and proof key of a submission; None if it was not announced."""
        query = (
            select(runs.c.run, submissions.c.proof_key)
            .join(submissions, submissions.c.run_key == runs.c.run_key)
            .where(submissions.c.submission_id == submission_id, runs.c.run.is_not(None))
        )
        with self.transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (Run.model_validate_json(row.run), row.proof_key)

    def accepts_unproven(self, run_id: str) -> bool | None:
        """Whether the run has a submission without proofs, from an older producer; None if the run
        was not announced.
        """
        query = (
            select(func.count().label("sent"), func.count(submissions.c.proof_key).label("proven"))
            .select_from(runs)
            .outerjoin(submissions, submissions.c.run_key == runs.c.run_key)
            .where(runs.c.run_id == run_id, runs.c.run.is_not(None))
            .group_by(runs.c.run_key)
        )
        with self.transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else row.sent > row.proven

    def add_submission(self, run_key: int, submission_id: str, proof_key: str) -> None:
        """Add a submission of the run without a producer's announcement, before its claims are
        sent.
        """
        submission = {
            "submission_id": submission_id,
            "run_key": run_key,
            "proof_key": proof_key,
        }
        with self.transaction() as connection:
            connection.execute(self._insert_submission.values(submission))

    def note_missing_claims(self, run_ids: Iterable[str]) -> None:
        """Mark these runs: their claims without an outcome are in no queue and at no worker."""
        with self.transaction() as connection:
            connection.execute(
                update(runs)
                .where(runs.c.run_id.in_(run_ids), runs.c.nowhere_since.is_(None))
                .values(nowhere_since=self._now())
            )

    def remove_foreign(self, run_id: str, claims: Iterable[Claim]) -> list[str]:
        """Delete the outcomes of claims that are not the run's, and return their ids. `claims` are
        the run's claims, in the order of the input.
        """
        ours = (
            (position, {claim.claim_id for claim in some})
            for position, some in groupby(claims, key=lambda claim: claim.position)
        )
        position, ids = next(ours, (-1, set()))
        foreign: list[Row[Any]] = []
        query = (
            select(outcomes.c.run_key, *_COUNTED_COLUMNS)
            .join(runs, runs.c.run_key == outcomes.c.run_key)
            .where(runs.c.run_id == run_id)
            .order_by(outcomes.c.position)
            .execution_options(yield_per=_CHUNK_ROWS)
        )
        counts = RunCounts()
        with self.transaction() as connection:
            for row in connection.execute(query):
                while position < row.position and (further := next(ours, None)) is not None:
                    position, ids = further
                if position != row.position or row.claim_id not in ids:
                    foreign.append(row)
            for row in foreign:
                this = and_(
                    outcomes.c.run_key == row.run_key,
                    outcomes.c.claim_id == row.claim_id,
                    outcomes.c.delivery_key == row.delivery_key,
                )
                if not connection.execute(delete(outcomes).where(this)).rowcount:
                    continue  # another outcome replaced it meanwhile
                counts.remove(row.run_key, [row._mapping])
                if row.label is not None:
                    delivery = deliveries.c.delivery_key == row.delivery_key
                    fresh = {"fresh": deliveries.c.fresh - 1}
                    connection.execute(update(deliveries).where(delivery).values(fresh))
                    attempt = connection.execute(select(deliveries.c.attempt).where(delivery))
                    counts.change(row.run_key, lost_work=-(attempt.scalar_one() > 1))
            counts.write(connection)
        return [row.claim_id for row in foreign]

    def cancel(self, run_key: int) -> None:
        """Cancel all submissions of the run so far."""
        with self.transaction() as connection:
            connection.execute(
                update(submissions)
                .where(submissions.c.run_key == run_key, submissions.c.cancelled_at.is_(None))
                .values(cancelled_at=self._now())
            )

    def cancelled_submissions(self, settled_runs: Collection[str] = ()) -> tuple[str, ...]:
        """The cancelled submissions, the latest first, as many as a control update can hold. After
        a while, those of `settled_runs`, which have no claims left, are left out.
        """
        query = (
            select(submissions.c.submission_id, submissions.c.cancelled_at, runs.c.run_id)
            .join(runs, runs.c.run_key == submissions.c.run_key)
            .where(submissions.c.cancelled_at.is_not(None))
            .order_by(submissions.c.cancelled_at.desc())
            .limit(MAX_CANCELLED)
        )
        lately = self._now() - _CANCELLED_SECONDS
        with self.transaction() as connection:
            return tuple(
                row.submission_id
                for row in connection.execute(query)
                if row.cancelled_at > lately or row.run_id not in settled_runs
            )

    def _now(self) -> float:
        return self._clock_offset + time.monotonic()

    def _write_verdicts(
        self, connection: Connection, key: int, batch: VerdictBatch, now: float, counts: RunCounts
    ) -> dict[str, Any]:
        delivery = secrets.randbits(62)
        evidence = (evidence_number(split_verdict_proof(proof)[1]) for proof in batch.proofs)
        rows = [
            {
                "run_key": key,
                "claim_id": verdict.claim_id,
                "position": verdict.position,
                "claim": verdict.text,
                "gold": verdict.gold,
                "label": verdict.label,
                "probabilities": _by_label(batch.labels, verdict.probabilities),
                "mass": verdict.mass,
                "raw_text": verdict.raw_text,
                "prompt_tokens": verdict.prompt_tokens,
                "reasoning": verdict.reasoning,
                "reasoning_tokens": (
                    None if verdict.reasoning is None else verdict.reasoning_tokens
                ),
                "delivery_key": delivery,
                "reason": None,
                "detail": None,
                "evidence": None,
                "evidence_number": number,
                "failures": None,
                "dropped": False,
            }
            for verdict, number in zip(batch.verdicts, chain(evidence, repeat(None)), strict=False)
        ]
        fresh = self._write_outcomes(connection, key, rows, counts)
        counts.change(
            key,
            messages=1,
            duplicates=len(rows) - fresh,
            lost_work=len(rows) if batch.attempt > 1 else 0,
        )
        return {
            "delivery_key": delivery,
            "run_key": key,
            "batch_id": batch.batch_id,
            "worker_id": batch.worker_id,
            "device": batch.device,
            "attempt": batch.attempt,
            "engine_seconds": batch.engine_seconds,
            "fresh": fresh,
            "duplicates": len(rows) - fresh,
            "prompt_tokens": sum(verdict.prompt_tokens for verdict in batch.verdicts),
            "reasoning_tokens": sum(verdict.reasoning_tokens for verdict in batch.verdicts),
            "received_at": now,
        }

    def _write_outcomes(
        self, connection: Connection, key: int, rows: Sequence[dict[str, Any]], counts: RunCounts
    ) -> int:
        """Write and count the outcomes of claims that have none or are dead; returns how many.

        The first verdict stays; a later outcome replaces a dead claim.
        """
        written = connection.exec_driver_sql(self._insert_outcomes, rows).rowcount
        if written == len(rows):
            counts.add(key, rows)
            return written
        by_id = {row["claim_id"]: row for row in reversed(rows)}  # the first of each claim
        own = {row["delivery_key"] for row in rows}
        found = [*self._rows_among(connection, key, [*by_id], *_COUNTED_COLUMNS, lock=True)]
        new = [row for row in found if row.delivery_key in own]
        dead = [row for row in found if row.label is None and row.delivery_key not in own]
        counts.add(key, [row._mapping for row in new])
        counts.remove(key, [row._mapping for row in dead])
        for row in dead:
            connection.execute(self._delete_outcome, {"of_run": key, "of_claim": row.claim_id})
            # A dead claim that is delivered again stays dropped.
            by_id[row.claim_id]["dropped"] = row.dropped and by_id[row.claim_id]["label"] is None
        # With dead claims that were reopened in between.
        kept = {row.claim_id for row in found} - {row.claim_id for row in dead}
        rest = [row for claim_id, row in by_id.items() if claim_id not in kept]
        return len(new) + (self._write_outcomes(connection, key, rest, counts) if rest else 0)

    def _run_key(self, connection: Connection, run_id: str, now: float) -> int:
        """The run's key; a new run is inserted."""
        key = _find_run_key(connection, run_id)
        if key is None:
            connection.execute(self._insert_run.values(run_id=run_id, first_seen=now))
            key = _find_run_key(connection, run_id)
            assert key is not None
            connection.execute(self._insert_counts.values(run_key=key, high=0, low=0))
        return key


def _find_run_key(connection: Connection, run_id: str) -> int | None:
    return connection.execute(select(runs.c.run_key).where(runs.c.run_id == run_id)).scalar()


def _write_announcement(connection: Connection, key: int, announcement: RunAnnouncement) -> None:
    totals = announcement.totals.model_dump() if announcement.totals else {}
    for name in ("digest", "positions"):
        if (value := getattr(announcement, name)) is not None:
            totals[name] = value
    if announcement.input is not None:
        totals["input"] = announcement.input.model_dump_json()
    connection.execute(
        update(runs)
        .where(runs.c.run_key == key)
        .values(run=announcement.run.model_dump_json(), **totals)
    )


def _by_label(labels: Sequence[str], probabilities: Sequence[float]) -> str | None:
    """JSON, label -> probability; None if no answer could be read."""
    if not probabilities:
        return None
    return to_json(dict(zip(labels, probabilities, strict=True))).decode()


def _dead_row(key: int, dead: DeadClaim) -> dict[str, Any]:
    return dict.fromkeys(_OUTCOME_COLUMNS) | {
        "run_key": key,
        "claim_id": dead.claim.claim_id,
        "position": dead.claim.position,
        "claim": dead.claim.text,
        "gold": dead.claim.gold,
        "reason": dead.reason.value,
        "detail": dead.detail,
        "evidence": dead.claim.evidence,
        "failures": dead.failures,
        "dropped": False,
        # Distinguishes this death from a later one of the same claim.
        "delivery_key": secrets.randbits(62),
    }


def _startup_row(ready: ContextReady, now: float) -> dict[str, Any]:
    return {
        **ready.model_dump(include=set(startups.columns.keys())),
        **ready.phases.model_dump(),
        "received_at": now,
    }
