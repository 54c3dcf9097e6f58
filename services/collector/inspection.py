"""What a store is like, found out without a change to it."""

import sqlite3
from dataclasses import dataclass

from sqlalchemy import Connection, false, insert, select, text, update

from services.collector.database import open_engine, refuse_encoding
from services.collector.schema import SCHEMA_VERSION, metadata, schema_info
from services.collector.store import Store
from services.collector.versions import UPGRADABLE, one_at_a_time, refusal, version_of
from services.contracts import Settings
from services.contracts.errors import StoreError

# PostgreSQL's codes: insufficient privilege, and a transaction that can only read.
_READ_ONLY = ("42501", "25006")


@dataclass(frozen=True)
class Inspected:
    version: int | None
    """This Keepwarm's, or one that it brings up to date; None: it is empty."""
    read_only: str | None
    """Why this user can read it, and not write it; None where it can."""


def inspect_store(settings: Settings) -> Inspected:
    """Raises StoreError when it cannot be used."""
    engine = open_engine(settings, create=False, as_it_is=True)
    store, read_only = Store(engine), None
    try:
        with store.transaction() as connection:
            refuse_encoding(connection)
            version = version_of(connection)
        if version != SCHEMA_VERSION and version not in UPGRADABLE:
            raise refusal(engine.url, version)
        try:
            with store.transaction() as connection:
                one_at_a_time(connection)
                read_only = _try_to_write(connection, version)
                connection.rollback()
        except StoreError as error:
            cause = getattr(error.__cause__, "orig", None)
            if not _is_read_only(cause):
                raise
            read_only = str(cause).splitlines()[0]
    finally:
        engine.dispose()
    return Inspected(version, read_only)


def _is_read_only(cause: BaseException | None) -> bool:
    if isinstance(cause, sqlite3.Error):
        return cause.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY  # and its extended codes
    return getattr(cause, "sqlstate", None) in _READ_ONLY


def _try_to_write(connection: Connection, version: int | None) -> str | None:
    """What a collector writes, for a transaction that is rolled back."""
    if version != SCHEMA_VERSION:
        metadata.create_all(connection)
    connection.execute(insert(schema_info).values(version=-1))
    for table in metadata.tables.values():
        # No row, for those come with locks and numbers; rights are asked for all the same.
        nothing = select(table).where(false())
        connection.execute(insert(table).from_select(table.columns.keys(), nothing))
        key = next(iter(table.primary_key))
        connection.execute(update(table).values({key: key}).where(false()))
    if connection.dialect.name == "postgresql":
        # Where runs get their numbers from. A grant on all tables does not hold for it.
        ask = "SELECT has_sequence_privilege(pg_get_serial_sequence('runs', 'run_key'), 'USAGE')"
        if connection.execute(text(ask)).scalar() is False:
            return "permission denied for the sequence of runs.run_key"
    return None
