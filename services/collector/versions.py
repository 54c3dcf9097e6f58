"""The store's schema version: its tables are made, and a store of before is brought up to date."""

from sqlalchemy import Connection, delete, insert, inspect, select

from services.collector.schema import SCHEMA_VERSION, metadata, schema_info, verdict_counts
from services.collector.verdict_counts import count_all

_UPGRADABLE = (None, 2, 3)
"""Versions (None: no tables) that lack tables or indexes of this one, and differ in nothing else.

3 added `startups` and `outcomes_dead`, 4 `verdict_counts`.
"""
_ONE_AT_A_TIME = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(75357110)",
}


def up_to_date(connection: Connection) -> int | None:
    """The store's schema version, after adding what it lacks where that is all there is to do.

    To be called first in a transaction. Any other version is left as it is.
    """
    version = _version(connection)
    if version in _UPGRADABLE:
        # Two services may open a new store at the same moment; one makes its tables.
        connection.exec_driver_sql(_ONE_AT_A_TIME[connection.dialect.name])
        version = _version(connection)  # who was first may have been of another version
    if version not in _UPGRADABLE:
        return version
    counted = inspect(connection).has_table(verdict_counts.name)
    metadata.create_all(connection)
    for table in metadata.tables.values():
        for index in table.indexes:  # `create_all` gives none to a table that is there
            index.create(connection, checkfirst=True)
    if not counted:
        count_all(connection)
    connection.execute(delete(schema_info))
    connection.execute(insert(schema_info).values(version=SCHEMA_VERSION))
    return SCHEMA_VERSION


def _version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(schema_info.name):
        return None
    return connection.execute(select(schema_info.c.version)).scalar()
