"""Creates the store's tables, and upgrades a store of an older version."""

from sqlalchemy import URL, Connection, delete, insert, inspect, select
from sqlalchemy.schema import CreateColumn

from services.contracts.errors import StoreError
from services.contracts.proofs import ClaimsDigest
from services.store.database import redacted
from services.store.run_counts import digest_of, set_digest
from services.store.schema import SCHEMA_VERSION, is_dead, metadata, schema_info

UPGRADABLE = (None, 2, 3, 4, 5, 6, 7)
"""Versions (None: no tables) that can be upgraded.

3 added `startups` and `outcomes_dead`, 4 `verdict_counts`, 5 the column `runs.input`, 6
`verdict_digests` and the columns for proofs. 7 has `run_counts` in place of `verdict_digests` and
the column `runs.returned`, and other indexes of `deliveries`. 8 added
`outcomes.evidence_number` and the columns for reasoning.
"""
_COUNT_LABELS = """
INSERT INTO verdict_counts (run_key, label, verdicts, judged, correct)
SELECT run_key, label, count(*), count(gold), sum(CASE WHEN gold = label THEN 1 ELSE 0 END)
FROM outcomes WHERE label IS NOT NULL GROUP BY run_key, label
"""
_COUNT_RUNS = """
INSERT INTO run_counts (run_key, dead, messages, duplicates, lost_work, returned)
SELECT runs.run_key,
  (SELECT count(*) FROM outcomes WHERE outcomes.run_key = runs.run_key AND reason IS NOT NULL),
  count(delivery_key), coalesce(sum(duplicates), 0),
  coalesce(sum(CASE WHEN attempt > 1 THEN fresh + duplicates END), 0), returned
FROM runs LEFT JOIN deliveries ON deliveries.run_key = runs.run_key
GROUP BY runs.run_key, returned
"""
# Those of version 6 are of the claims with a verdict, and NULL if the run is older.
_DIGESTS = """
SELECT runs.run_key,
  CASE WHEN digests.run_key IS NULL THEN 0 ELSE high END,
  CASE WHEN digests.run_key IS NULL THEN 0 ELSE low END
FROM runs LEFT JOIN verdict_digests AS digests ON digests.run_key = runs.run_key
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
    for table in metadata.tables.values():
        for index in table.indexes:  # `create_all` adds none to existing tables
            index.create(connection, checkfirst=True)
    if version is not None:
        if "verdict_counts" not in existing:
            connection.exec_driver_sql(_COUNT_LABELS)
        if "run_counts" not in existing:
            connection.exec_driver_sql("DROP INDEX IF EXISTS ix_deliveries_run_key")
            connection.exec_driver_sql(_COUNT_RUNS)
    if "verdict_digests" in existing:
        _add_digests(connection)
    connection.execute(delete(schema_info))
    connection.execute(insert(schema_info).values(version=SCHEMA_VERSION))
    return SCHEMA_VERSION


def _add_digests(connection: Connection) -> None:
    """Those of version 6, with the dead claims."""
    for run_key, high, low in connection.exec_driver_sql(_DIGESTS).all():
        if high is not None:
            dead = digest_of(connection, run_key, is_dead)
            set_digest(connection, run_key, ClaimsDigest(high, low).plus(dead))
    connection.exec_driver_sql("DROP TABLE verdict_digests")


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
            f"the store {redacted(url)} has schema version {version} and must be "
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
