"""The store's tables. The key of `outcomes` ensures that each claim of a run is stored once."""

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

SCHEMA_VERSION = 8

metadata = MetaData()

schema_info = Table("keepwarm_schema", metadata, Column("version", Integer, primary_key=True))

# SQLite generates keys only for the type INTEGER PRIMARY KEY.
_Key = BigInteger().with_variant(Integer, "sqlite")

runs = Table(
    "runs",
    metadata,
    Column("run_key", _Key, primary_key=True, autoincrement=True),
    Column("run_id", String(256), nullable=False),
    # The Run as JSON; NULL if verdicts came before the announcement.
    Column("run", Text),
    # The producer's InputSummary as JSON; NULL while it is not known.
    Column("input", Text),
    # Totals, once the producer has sent everything.
    Column("lines", BigInteger),
    Column("claims", BigInteger),
    Column("repeated", BigInteger),
    Column("rejected", BigInteger),
    Column("first_seen", Float, nullable=False),
    # The ClaimsDigest and the Positions of all claims; NULL if the producer announced none.
    Column("digest", String(64)),
    Column("positions", Text),
    # Since when its claims are missing: in no queue and at no worker. NULL if they are not.
    Column("nowhere_since", Float),
    UniqueConstraint("run_id"),
)

# Each submission of a run. Cancelling a run cancels its submissions so far. It may be submitted
# again; then the claims of the new submission are wanted, and those of the earlier ones are not.
submissions = Table(
    "submissions",
    metadata,
    Column("submission_id", String(256), primary_key=True),
    Column("run_key", BigInteger, nullable=False, index=True),
    Column("cancelled_at", Float),
    # The key of its claims' proofs; NULL if its producer made none.
    Column("proof_key", String(64)),
)

# One row per message of verdicts, redelivered ones included: who computed them, and when.
deliveries = Table(
    "deliveries",
    metadata,
    Column("delivery_key", BigInteger, primary_key=True, autoincrement=False),
    Column("run_key", BigInteger, nullable=False),
    Column("batch_id", String(256), nullable=False),
    Column("worker_id", String(512), nullable=False),
    Column("device", String(512), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("engine_seconds", Float, nullable=False),
    # Claims that had no outcome before, and claims that had.
    Column("fresh", Integer, nullable=False),
    Column("duplicates", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    # Tokens that the model wrote before it answered; NULL if an older version stored it.
    Column("reasoning_tokens", BigInteger),
    Column("received_at", Float, nullable=False),
)

# To find a run's workers, and its latest messages, without reading all of them.
Index("deliveries_worker", deliveries.c.run_key, deliveries.c.worker_id)
Index(
    "deliveries_received",
    *(deliveries.c[name] for name in ("run_key", "received_at", "fresh", "engine_seconds")),
)

# A verdict (label) or a dead claim (reason). A later outcome replaces a dead claim.
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
    # What the model wrote before it answered; NULL if the prompt asks for no reasoning.
    Column("reasoning", Text),
    Column("reasoning_tokens", Integer),
    Column("delivery_key", BigInteger),
    Column("reason", String(64)),
    Column("detail", Text),
    Column("evidence", Text),
    # Of a verdict, the `evidence_number`. NULL without evidence, if the verdict had no proof, and
    # if it is from before version 8.
    Column("evidence_number", BigInteger),
    # For a dead claim: how often an engine failed with it, and whether a person dropped it.
    Column("failures", Integer),
    Column("dropped", Boolean, nullable=False, server_default=false()),
    sqlite_with_rowid=False,
)

# To find a run's dead claims without reading all its outcomes. SQLite uses it for a comparison, and
# not for IS NOT NULL.
is_dead = outcomes.c.reason > ""
Index(
    "outcomes_dead",
    outcomes.c.run_key,
    outcomes.c.reason,
    sqlite_where=outcomes.c.reason.is_not(None),
    postgresql_where=outcomes.c.reason.is_not(None),
)

# By run and label: the verdicts, those of claims with a gold label, and those that agree with it.
# Updated in the transaction that writes verdicts, so that `outcomes` need not be counted.
verdict_counts = Table(
    "verdict_counts",
    metadata,
    Column("run_key", BigInteger, primary_key=True, autoincrement=False),
    Column("label", String(64), primary_key=True),
    Column("verdicts", BigInteger, nullable=False),
    Column("judged", BigInteger, nullable=False),
    Column("correct", BigInteger, nullable=False),
)

# The other counters of a run, updated in the transaction that writes what they count. Its verdicts
# are those of `verdict_counts`.
run_counts = Table(
    "run_counts",
    metadata,
    Column("run_key", BigInteger, primary_key=True, autoincrement=False),
    # Dead claims.
    Column("dead", BigInteger, nullable=False, server_default="0"),
    # Messages of verdicts. Of these verdicts: those whose claims had one already, and those that
    # came from a batch which was delivered more than once.
    Column("messages", BigInteger, nullable=False, server_default="0"),
    Column("duplicates", BigInteger, nullable=False, server_default="0"),
    Column("lost_work", BigInteger, nullable=False, server_default="0"),
    # Claims that workers returned unfinished.
    Column("returned", BigInteger, nullable=False, server_default="0"),
    # The ClaimsDigest of the claims that have an outcome. NULL if the run is older than version 6,
    # so that it was not computed.
    Column("high", BigInteger),
    Column("low", BigInteger),
)

# One row each time that a context became ready for a worker. Seconds; NULL if not measured.
startups = Table(
    "startups",
    metadata,
    Column("startup_id", String(256), primary_key=True),
    Column("worker_id", String(512), nullable=False),
    Column("context_id", String(256), nullable=False, index=True),
    Column("device", String(512), nullable=False),
    # The engine was running already.
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
