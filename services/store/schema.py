"""The store's tables. `outcomes` holds each claim of a run once: its key is the promise."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

SCHEMA_VERSION = 6

metadata = MetaData()

schema_info = Table("keepwarm_schema", metadata, Column("version", Integer, primary_key=True))

# SQLite gives an INTEGER PRIMARY KEY by itself, and only to that very type.
_Key = BigInteger().with_variant(Integer, "sqlite")

runs = Table(
    "runs",
    metadata,
    Column("run_key", _Key, primary_key=True, autoincrement=True),
    Column("run_id", String(256), nullable=False),
    # The Run as JSON; NULL while verdicts have come but the announcement has not.
    Column("run", Text),
    # The producer's InputSummary as JSON; NULL while it is not known.
    Column("input", Text),
    # Totals, once the producer has sent everything.
    Column("lines", BigInteger),
    Column("claims", BigInteger),
    Column("repeated", BigInteger),
    Column("rejected", BigInteger),
    # Claims that workers gave back unfinished.
    Column("returned", BigInteger, nullable=False, server_default="0"),
    Column("first_seen", Float, nullable=False),
    # The ClaimsDigest and the Positions of all claims; NULL where the producer told none.
    Column("digest", String(64)),
    Column("positions", Text),
    # Since when its claims have been in no queue and with no worker; NULL while that is not so.
    Column("nowhere_since", Float),
    UniqueConstraint("run_id"),
)

# Each sending of a run. What is cancelled are the sendings that there were: the run may be sent
# again, and then its claims are wanted, while those of before are not.
submissions = Table(
    "submissions",
    metadata,
    Column("submission_id", String(256), primary_key=True),
    Column("run_key", BigInteger, nullable=False, index=True),
    Column("cancelled_at", Float),
    # With it the proofs of its claims are made; NULL where its producer made none.
    Column("proof_key", String(64)),
)

# One row a message of verdicts that came, redelivered ones included: who computed what, and when.
deliveries = Table(
    "deliveries",
    metadata,
    Column("delivery_key", BigInteger, primary_key=True, autoincrement=False),
    Column("run_key", BigInteger, nullable=False, index=True),
    Column("batch_id", String(256), nullable=False),
    Column("worker_id", String(512), nullable=False),
    Column("device", String(512), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("engine_seconds", Float, nullable=False),
    # Claims that had no outcome before, and claims that had.
    Column("fresh", Integer, nullable=False),
    Column("duplicates", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("received_at", Float, nullable=False),
)

# A verdict (label) or a dead claim (reason). A dead claim gives way to a later outcome.
outcomes = Table(
    "outcomes",
    metadata,
    Column("run_key", BigInteger, primary_key=True, autoincrement=False),
    Column("claim_id", String(256), primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("claim", Text, nullable=False),
    Column("gold", String(64)),
    Column("label", String(64)),
    Column("probabilities", Text),
    Column("mass", Float),
    Column("raw_text", Text),
    Column("prompt_tokens", Integer),
    Column("delivery_key", BigInteger),
    Column("reason", String(64)),
    Column("detail", Text),
    Column("evidence", Text),
    # Of a dead claim: how often an engine failed with it, and whether a person has let it go.
    Column("failures", Integer),
    Column("dropped", Boolean, nullable=False, server_default=false()),
    sqlite_with_rowid=False,
)

# How many claims of a run are dead, without a look at all its outcomes. SQLite uses it only where
# `reason` is a column of it.
Index(
    "outcomes_dead",
    outcomes.c.run_key,
    outcomes.c.reason,
    sqlite_where=outcomes.c.reason.is_not(None),
    postgresql_where=outcomes.c.reason.is_not(None),
)

# How many verdicts of a run have a label; of these how many claims have a gold label, and for how
# many the two agree. Whoever writes verdicts counts them here too, so that nobody has to go through
# `outcomes` for it.
verdict_counts = Table(
    "verdict_counts",
    metadata,
    Column("run_key", BigInteger, primary_key=True, autoincrement=False),
    Column("label", String(64), primary_key=True),
    Column("verdicts", BigInteger, nullable=False),
    Column("judged", BigInteger, nullable=False),
    Column("correct", BigInteger, nullable=False),
)

# The ClaimsDigest of a run's claims that have a verdict, kept by whoever writes verdicts. NULL: it
# was not counted, for the run is older than the table.
verdict_digests = Table(
    "verdict_digests",
    metadata,
    Column("run_key", BigInteger, primary_key=True, autoincrement=False),
    Column("high", BigInteger),
    Column("low", BigInteger),
)

# One row each time that a worker had a context ready. Seconds; NULL where it was not measured.
startups = Table(
    "startups",
    metadata,
    Column("startup_id", String(256), primary_key=True),
    Column("worker_id", String(512), nullable=False),
    Column("context_id", String(256), nullable=False, index=True),
    Column("device", String(512), nullable=False),
    # The engine was there already.
    Column("warm", Boolean, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("imports", Float),
    Column("fetch", Float),
    Column("load", Float),
    Column("compile", Float),
    Column("first_token", Float),
    Column("total", Float),
    Column("received_at", Float, nullable=False),
)
