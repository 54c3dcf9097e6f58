"""The store: opened with care, written in transactions, each claim of a run once."""

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    bindparam,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from services.collector.schema import (
    SCHEMA_VERSION,
    deliveries,
    metadata,
    outcomes,
    runs,
    schema_info,
)
from services.contracts import DeadClaim, RunAnnouncement, Settings, VerdictBatch
from services.contracts.errors import StoreError, UsageError

_SQLITE_CACHE_KIB = 16_384
_BUSY_SECONDS = 30
_MOST_PARAMETERS = 500
_ONE_AT_A_TIME = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(75357110)",
}

_OUTCOME_COLUMNS = [column.name for column in outcomes.columns]


@dataclass
class Incoming:
    """What is to be written in one transaction."""

    announcements: list[RunAnnouncement] = field(default_factory=list)
    verdicts: list[VerdictBatch] = field(default_factory=list)
    dead: list[DeadClaim] = field(default_factory=list)

    def run_ids(self) -> set[str]:
        return {
            *(announcement.run.run_id for announcement in self.announcements),
            *(batch.run_id for batch in self.verdicts),
            *(claim.run_id for claim in self.dead),
        }

    def __len__(self) -> int:
        """Claims, not messages."""
        return sum(len(batch.verdicts) for batch in self.verdicts) + len(self.dead)


class Store:
    """A database of runs and their outcomes.

    Every method raises StoreError, with the next step, when the database cannot do its part.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
        # As SQL, once: SQLAlchemy's handling of parameters would cost more than the database's
        # own work, and these rows hold nothing that needs it.
        self._insert_outcomes = str(
            dialect.insert(outcomes)
            .values({name: bindparam(name) for name in _OUTCOME_COLUMNS})
            .on_conflict_do_nothing()
            .compile(dialect=engine.dialect)
        )
        self._insert_run = dialect.insert(runs).on_conflict_do_nothing(index_elements=["run_id"])
        # Wall-clock time that cannot jump while this process lives.
        self._clock_offset = time.time() - time.monotonic()

    @classmethod
    def open(cls, settings: Settings, *, create: bool = True) -> "Store":
        """Open the store, and make its tables where there are none.

        Raises StoreError when it cannot be used, UsageError when the URL is not one.
        """
        url = _checked_url(settings)
        if url.get_backend_name() == "sqlite":
            _prepare_sqlite_file(url, create=create)
        if url.get_backend_name() == "sqlite":
            engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, paramstyle="named")
            event.listen(engine, "connect", _set_up_sqlite)
        else:
            engine = create_engine(
                url,
                connect_args={"connect_timeout": _BUSY_SECONDS, "application_name": "keepwarm"},
                pool_pre_ping=True,
            )
        store = cls(engine)
        with store.transaction() as connection:
            if not inspect(connection).has_table(schema_info.name):
                # Two services may open a new store at the same moment; one makes its tables.
                connection.exec_driver_sql(_ONE_AT_A_TIME[url.get_backend_name()])
                metadata.create_all(connection)
            version = connection.execute(select(schema_info.c.version)).scalar()
            if version is None:
                connection.execute(insert(schema_info).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise StoreError(
                    f"the store {_shown(url)} has schema version {version}; this Keepwarm knows "
                    f"{SCHEMA_VERSION}. Use another store, or the Keepwarm that made this one"
                )
        return store

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise StoreError(
                f"the store {_shown(self._engine.url)} failed: {str(cause).strip()}. Check that it "
                "is there, that this user may write to it, and that its disk is not full"
            ) from error

    def write(self, incoming: Incoming) -> None:
        """Write it all or nothing. Claims that have an outcome keep it; they are counted."""
        now = self._clock_offset + time.monotonic()
        with self.transaction() as connection:
            keys = {run: self._run_key(connection, run, now) for run in incoming.run_ids()}
            for announcement in incoming.announcements:
                _write_announcement(connection, keys[announcement.run.run_id], announcement)
            rows = [
                self._write_verdicts(connection, keys[batch.run_id], batch, now)
                for batch in incoming.verdicts
            ]
            if rows:
                connection.execute(insert(deliveries), rows)
            if incoming.dead:
                dead = [_dead_row(keys[claim.run_id], claim) for claim in incoming.dead]
                connection.exec_driver_sql(self._insert_outcomes, dead)

    def finished(self, run_id: str, claim_ids: Sequence[str]) -> set[str]:
        """Those of the ids that have an outcome in the run."""
        found: set[str] = set()
        with self.transaction() as connection:
            key = _find_run_key(connection, run_id)
            if key is None:
                return found
            for start in range(0, len(claim_ids), _MOST_PARAMETERS):
                query = select(outcomes.c.claim_id).where(
                    outcomes.c.run_key == key,
                    outcomes.c.claim_id.in_(claim_ids[start : start + _MOST_PARAMETERS]),
                )
                found.update(connection.execute(query).scalars())
        return found

    def _write_verdicts(
        self, connection: Connection, key: int, batch: VerdictBatch, now: float
    ) -> dict[str, Any]:
        delivery = secrets.randbits(62)
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
                "delivery_key": delivery,
                "reason": None,
                "detail": None,
                "evidence": None,
            }
            for verdict in batch.verdicts
        ]
        fresh = connection.exec_driver_sql(self._insert_outcomes, rows).rowcount
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
            "received_at": now,
        }

    def _run_key(self, connection: Connection, run_id: str, now: float) -> int:
        """The run's key; a new one for a run that was not heard of before."""
        key = _find_run_key(connection, run_id)
        if key is None:
            connection.execute(self._insert_run.values(run_id=run_id, first_seen=now))
            key = _find_run_key(connection, run_id)
            assert key is not None
        return key


def _find_run_key(connection: Connection, run_id: str) -> int | None:
    return connection.execute(select(runs.c.run_key).where(runs.c.run_id == run_id)).scalar()


def _write_announcement(connection: Connection, key: int, announcement: RunAnnouncement) -> None:
    totals = announcement.totals.model_dump() if announcement.totals else {}
    connection.execute(
        update(runs)
        .where(runs.c.run_key == key)
        .values(run=announcement.run.model_dump_json(), **totals)
    )


def _by_label(labels: Sequence[str], probabilities: Sequence[float]) -> str | None:
    """JSON, label -> probability; None where no answer could be read."""
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
    }


def _checked_url(settings: Settings) -> URL:
    text = settings.store
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise UsageError(
            "the store's URL is unusable; write a file's path, sqlite:///FILE, or "
            "postgresql://user@host/database"
        ) from error
    if url.get_backend_name() == "sqlite":
        return url
    if url.get_backend_name() != "postgresql":
        raise UsageError(
            f"the store must be SQLite or PostgreSQL, not {url.get_backend_name()}; see "
            "docs/settings.md"
        )
    password = settings.secret("store") or url.password
    return url.set(drivername="postgresql+psycopg", password=password)


def _shown(url: URL) -> str:
    """Without a password, wherever in the URL it stands."""
    return url.set(query={}).render_as_string(hide_password=True)


def _prepare_sqlite_file(url: URL, *, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise UsageError("the store needs a file: sqlite:///FILE; memory would forget it all")
    path = Path(url.database)
    try:
        if not path.exists():
            if not create:
                raise StoreError(
                    f"there is no store at {path}; name the one that you mean with --store or "
                    "KEEPWARM_STORE_URL (after `keepwarm run` it is keepwarm.sqlite in its "
                    "output directory)"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        with path.open("r+b"):
            pass
    except OSError as error:
        raise StoreError(
            f"the store {path} cannot be written by user {os.geteuid()}: {error.strerror}; mend "
            "its permissions, or name another with --store"
        ) from error


def _set_up_sqlite(connection: Any, _: Any) -> None:
    # A write-ahead log lets `status` read while the collector writes. FULL: what is committed
    # survives a power cut, for it is acknowledged to the broker right after.
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        f"cache_size = -{_SQLITE_CACHE_KIB}",
    ):
        connection.execute(f"PRAGMA {pragma}")
