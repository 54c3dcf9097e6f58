"""Creates the store's tables, and upgrades a store of an older version."""

from sqlalchemy import URL, Connection, delete, insert, inspect, select
from sqlalchemy.schema import CreateColumn

from services.contracts.errors import StoreError
from services.store.database import redacted
from services.store.label_counts import count_all
from services.store.schema import (
    SCHEMA_VERSION,
    metadata,
    runs,
    schema_info,
    verdict_counts,
    verdict_digests,
)

UPGRADABLE = (None, 2, 3, 4, 5)
"""Versions (None: no tables) that differ from the current one only in missing tables, indexes or
columns.

3 added `startups` and `outcomes_dead`, 4 `verdict_counts`, 5 the column `runs.input`, 6
`verdict_digests` and the columns for proofs.
"""
_ONE_AT_A_TIME = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(75357110)",
}


def upgrade(connection: Connection) -> int | None:
    """Upgrade the store if possible, and return its schema version. Other versions are unchanged.

    To be called first in a transaction.
    """
    version = schema_version(connection)
    if version in UPGRADABLE:
        # Two services may open a new store at the same time; one creates its tables.
        lock_schema(connection)
        version = schema_version(connection)  # another service may have changed it
    if version not in UPGRADABLE:
        return version
    existing = set(inspect(connection).get_table_names())
    metadata.create_all(connection)
    _add_columns(connection)
    if version is not None and verdict_digests.name not in existing:
        unknown = select(runs.c.run_key)  # until a producer announces a digest to compare with
        connection.execute(insert(verdict_digests).from_select(["run_key"], unknown))
    for table in metadata.tables.values():
        for index in table.indexes:  # `create_all` adds none to existing tables
            index.create(connection, checkfirst=True)
    if verdict_counts.name not in existing:
        count_all(connection)
    connection.execute(delete(schema_info))
    connection.execute(insert(schema_info).values(version=SCHEMA_VERSION))
    return SCHEMA_VERSION


def _add_columns(connection: Connection) -> None:
    """Add the columns that an older version lacks; each is nullable."""
    inspected = inspect(connection)
    for table in metadata.tables.values():
        existing = {column["name"] for column in inspected.get_columns(table.name)}
        for column in table.columns:
            if column.name not in existing:
                added = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {added}")


def lock_schema(connection: Connection) -> None:
    """Exclude other schema changes until the end of the transaction."""
    connection.exec_driver_sql(_ONE_AT_A_TIME[connection.dialect.name])


def version_error(url: URL, version: int | None, *, reads_only: bool = False) -> StoreError:
    if reads_only and version in UPGRADABLE:
        return StoreError(
            f"the store {redacted(url)} has schema version {version or 'none'} and must be "
            f"upgraded to version {SCHEMA_VERSION}, which this user cannot do; ask its owner to "
            "run `keepwarm status` on it once, or copy the file"
        )
    return StoreError(
        f"the store {redacted(url)} has schema version {version}; this Keepwarm "
        f"supports {SCHEMA_VERSION}. Use another store, or the Keepwarm version that made this one"
    )


def schema_version(connection: Connection) -> int | None:
    """The store's schema version; None if it has no tables."""
    if not inspect(connection).has_table(schema_info.name):
        return None
    return connection.execute(select(schema_info.c.version)).scalar()
