"""Inspects a store's schema version and permissions without changing it."""

import sqlite3
from dataclasses import dataclass

from sqlalchemy import Connection, false, insert, inspect, select, text, update

from services.contracts import Settings
from services.contracts.errors import StoreError
from services.store.database import open_engine, redacted, require_utf8
from services.store.migrations import UPGRADABLE, lock_schema, schema_version, version_error
from services.store.schema import SCHEMA_VERSION, metadata, schema_info
from services.store.store import Store

# PostgreSQL's codes: insufficient privilege, and a transaction that can only read.
_READ_ONLY = ("42501", "25006")


_MAY_WRITE = (
    "SELECT has_table_privilege(:name, 'SELECT') AND has_table_privilege(:name, 'INSERT') "
    "AND has_table_privilege(:name, 'UPDATE')"
)
# The sequence of run keys. A grant on all tables does not include it.
_MAY_NUMBER = "SELECT has_sequence_privilege(pg_get_serial_sequence('runs', 'run_key'), 'USAGE')"
_NO_NUMBERS = "permission denied for the sequence of runs.run_key"


@dataclass(frozen=True)
class StoreInspection:
    version: int | None
    """The current version, or one that can be upgraded; None if the store is empty."""
    read_only: str | None
    """Why this user can only read it; None if it can write."""


def inspect_store(settings: Settings) -> StoreInspection:
    """Raises StoreError if it cannot be used."""
    engine = open_engine(settings, create=False, as_it_is=True)
    store, read_only = Store(engine), None
    try:
        with store.transaction() as connection:
            require_utf8(connection)
            version = schema_version(connection)
        if version != SCHEMA_VERSION and version not in UPGRADABLE:
            raise version_error(engine.url, version)
        try:
            with store.transaction() as connection:
                lock_schema(connection)
                read_only = _try_to_write(connection, version)
                connection.rollback()
        except StoreError as error:
            cause = getattr(error.__cause__, "orig", None)
            if not _is_read_only(cause):
                raise
            read_only = str(cause).splitlines()[0]
    finally:
        engine.dispose()
    return StoreInspection(version, read_only)


def _is_read_only(cause: BaseException | None) -> bool:
    if isinstance(cause, sqlite3.Error):
        return cause.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY  # any extended code
    return getattr(cause, "sqlstate", None) in _READ_ONLY


def _try_to_write(connection: Connection, version: int | None) -> str | None:
    """Write what a collector writes, in a transaction to be rolled back; why not, if it fails."""
    if version != SCHEMA_VERSION:
        metadata.create_all(connection)
    connection.execute(insert(schema_info).values(version=-1))
    for table in metadata.tables.values():
        # No row, to avoid locks and key allocation; permissions are checked all the same.
        existing = {column["name"] for column in inspect(connection).get_columns(table.name)}
        columns = [column for column in table.columns if column.name in existing]
        nothing = select(*columns).where(false())
        connection.execute(insert(table).from_select([each.name for each in columns], nothing))
        key = next(iter(table.primary_key))
        connection.execute(update(table).values({key: key}).where(false()))
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql and connection.execute(text(_MAY_NUMBER)).scalar() is False:
        return _NO_NUMBERS
    return None


def require_writable(store: Store) -> None:
    """Raises StoreError if this user of a PostgreSQL store lacks a collector's permissions: it
    would retry forever. Takes no lock. (`Store.open` refuses a read-only SQLite file.)
    """
    with store.transaction() as connection:
        if connection.dialect.name != "postgresql":
            return
        why = None
        if connection.execute(text("SHOW transaction_read_only")).scalar() == "on":
            why = "the server, or this user's setting, allows only read-only transactions"
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
                f"this user can read the store {redacted(connection.engine.url)} but not write "
                f"it: {why}. Use another user or server, or grant this one SELECT, INSERT, "
                "UPDATE and DELETE on all tables and USAGE on all sequences"
            )
