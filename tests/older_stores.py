"""Makes a store of this version one of an older version, with what such a store had."""

from sqlalchemy import Connection, inspect, text

from services.contracts.proofs import ClaimsDigest
from services.store.run_counts import digest_of
from services.store.schema import outcomes

_STEPS = {
    7: """
        ALTER TABLE deliveries DROP COLUMN reasoning_tokens;
        ALTER TABLE outcomes DROP COLUMN reasoning;
        ALTER TABLE outcomes DROP COLUMN reasoning_tokens;
        ALTER TABLE outcomes DROP COLUMN evidence_number
    """,
    6: """
        ALTER TABLE runs ADD COLUMN returned BIGINT DEFAULT 0 NOT NULL;
        UPDATE runs SET returned =
          (SELECT returned FROM run_counts WHERE run_counts.run_key = runs.run_key);
        DROP TABLE run_counts;
        DROP INDEX deliveries_worker;
        DROP INDEX deliveries_received;
        CREATE INDEX ix_deliveries_run_key ON deliveries (run_key);
        CREATE TABLE verdict_digests (run_key BIGINT PRIMARY KEY, high BIGINT, low BIGINT)
    """,
    5: """
        DROP TABLE verdict_digests;
        ALTER TABLE runs DROP COLUMN digest;
        ALTER TABLE runs DROP COLUMN positions;
        ALTER TABLE runs DROP COLUMN nowhere_since;
        ALTER TABLE submissions DROP COLUMN proof_key
    """,
    4: "ALTER TABLE runs DROP COLUMN input",
    3: "DROP TABLE verdict_counts",
    2: "DROP TABLE startups; DROP INDEX outcomes_dead",
}


def downgrade(connection: Connection, version: int) -> None:
    def execute(statement: str, **values: object) -> None:
        connection.execute(text(statement), values)

    if "returned" in {each["name"] for each in inspect(connection).get_columns("runs")}:
        execute("ALTER TABLE runs DROP COLUMN returned")  # the upgrade from version 6 leaves it
    digests = connection.execute(text("SELECT run_key, high IS NULL FROM run_counts")).all()
    for step, statements in _STEPS.items():
        if step < version:
            break
        for statement in statements.split(";"):
            execute(statement)
        for run_key, is_unknown in digests if step == 6 else ():
            verdicts = digest_of(connection, run_key, outcomes.c.label.is_not(None))
            if is_unknown or verdicts != ClaimsDigest():
                execute(
                    "INSERT INTO verdict_digests VALUES (:run_key, :high, :low)",
                    run_key=run_key,
                    high=None if is_unknown else verdicts.high,
                    low=None if is_unknown else verdicts.low,
                )
    execute("UPDATE keepwarm_schema SET version = :version", version=version)
