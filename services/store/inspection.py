"""What a store is like, found out without a change to it."""

import sqlite3
from dataclasses import dataclass

from sqlalchemy import Connection, false, insert, inspect, select, text, update

from services.contracts import Settings
from services.contracts.errors import StoreError
from services.store.database import open_engine, refuse_encoding, shown
from services.store.migrations import UPGRADABLE, one_at_a_time, refusal, version_of
from services.store.schema import SCHEMA_VERSION, metadata, schema_info
from services.store.store import Store

# PostgreSQL's codes: insufficient privilege, and a transaction that can only read.
_READ_ONLY = ("42501", "25006")


_MAY_WRITE = (
    "SELECT has_table_privilege(:name, 'SELECT') AND has_table_privilege(:name, 'INSERT') "
    "AND has_table_privilege(:name, 'UPDATE')"
)
# Where runs get their numbers from. A grant on all tables does not hold for it.
_MAY_NUMBER = "SELECT has_sequence_privilege(pg_get_serial_sequence('runs', 'run_key'), 'USAGE')"
_NO_NUMBERS = "permission denied for the sequence of runs.run_key"


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
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        columns = [column for column in table.columns if column.name in there]
        nothing = select(*columns).where(false())
        connection.execute(insert(table).from_select([each.name for each in columns], nothing))
        key = next(iter(table.primary_key))
        connection.execute(update(table).values({key: key}).where(false()))
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql and connection.execute(text(_MAY_NUMBER)).scalar() is False:
        return _NO_NUMBERS
    return None


def refuse_read_only(store: Store) -> None:
    """Raises StoreError where this user of a PostgreSQL store may not write what a collector does:
    it would wait for that without end. Takes no lock. (`Store.open` refuses such an SQLite file.)
    """
    with store.transaction() as connection:
        if connection.dialect.name != "postgresql":
            return
        why = None
        if connection.execute(text("SHOW transaction_read_only")).scalar() == "on":
            why = "the server, or this user's setting, allows read-only transactions alone"
        elif connection.execute(text(_MAY_NUMBER)).scalar() is False:
            why = _NO_NUMBERS
        else:
            for name in metadata.tables:
                rights = connection.execute(text(_MAY_WRITE), {"name": name}).scalar()
                if rights is False:
                    why = f"permission denied for table {name}"
                    break
        if why is not None:
            raise StoreError(
                f"the store {shown(connection.engine.url)} can be read by this user and not "
                f"written: {why}. Name another user or server, or grant this one SELECT, INSERT, "
                "UPDATE and DELETE on all tables and USAGE on all sequences"
            )
