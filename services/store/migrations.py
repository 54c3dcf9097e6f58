"""The store's schema version: its tables are made, and a store of before is brought up to date."""

from sqlalchemy import URL, Connection, delete, insert, inspect, select
from sqlalchemy.schema import CreateColumn

from services.contracts.errors import StoreError
from services.store.database import shown
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
"""Versions (None: no tables) that lack tables, indexes or columns of this one, and differ in
nothing else.

3 added `startups` and `outcomes_dead`, 4 `verdict_counts`, 5 the column `runs.input`, 6
`verdict_digests` and the columns for proofs.
"""
_ONE_AT_A_TIME = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(75357110)",
}


def up_to_date(connection: Connection) -> int | None:
    """The store's schema version, after adding what it lacks where that is all there is to do.

    To be called first in a transaction. Any other version is left as it is.
    """
    version = version_of(connection)
    if version in UPGRADABLE:
        # Two services may open a new store at the same moment; one makes its tables.
        one_at_a_time(connection)
        version = version_of(connection)  # who was first may have been of another version
    if version not in UPGRADABLE:
        return version
    there = set(inspect(connection).get_table_names())
    metadata.create_all(connection)
    _add_columns(connection)
    if version is not None and verdict_digests.name not in there:
        unknown = select(runs.c.run_key)  # until a producer announces a digest to compare with
        connection.execute(insert(verdict_digests).from_select(["run_key"], unknown))
    for table in metadata.tables.values():
        for index in table.indexes:  # `create_all` gives none to a table that is there
            index.create(connection, checkfirst=True)
    if verdict_counts.name not in there:
        count_all(connection)
    connection.execute(delete(schema_info))
    connection.execute(insert(schema_info).values(version=SCHEMA_VERSION))
    return SCHEMA_VERSION


def _add_columns(connection: Connection) -> None:
    """Those that a table of an older version lacks; each of them may be NULL."""
    inspected = inspect(connection)
    for table in metadata.tables.values():
        there = {column["name"] for column in inspected.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                added = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {added}")


def one_at_a_time(connection: Connection) -> None:
    """Until the end of the transaction nobody else makes tables here."""
    connection.exec_driver_sql(_ONE_AT_A_TIME[connection.dialect.name])


def refusal(url: URL, version: int | None, *, reads_only: bool = False) -> StoreError:
    if reads_only and version in UPGRADABLE:
        return StoreError(
            f"the store {shown(url)} has schema version {version or 'none'} and must be brought up "
            f"to version {SCHEMA_VERSION}, which this user may not do; ask its owner to run "
            "`keepwarm status` on it once, or copy the file"
        )
    return StoreError(
        f"the store {shown(url)} has schema version {version}; this Keepwarm "
        f"knows {SCHEMA_VERSION}. Use another store, or the Keepwarm that made this one"
    )


def version_of(connection: Connection) -> int | None:
    """None: there are no tables."""
    if not inspect(connection).has_table(schema_info.name):
        return None
    return connection.execute(select(schema_info.c.version)).scalar()
