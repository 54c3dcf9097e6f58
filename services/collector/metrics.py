"""The collector's metrics of what it commits. It sees every outcome, and outlives the workers."""

from collections import Counter as Counts
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from services.contracts import DeadReason, StartupPhases
from services.contracts.heartbeats import Ending
from services.store.store import Incoming
from services.telemetry import BoundedLabels

_device, _label = BoundedLabels(), BoundedLabels()

VERDICTS = Counter(
    "keepwarm_store_verdicts_total",
    "Verdicts committed, by device and label, duplicates included.",
    ["device", "label"],
)
JUDGED = Counter(
    "keepwarm_store_gold_verdicts_total",
    "Verdicts committed on claims with a gold label, by whether they agree with it.",
    ["correct"],
)
DUPLICATES = Counter(
    "keepwarm_store_duplicate_verdicts_total",
    "Verdicts ignored because their claims already had one.",
)
LOST_WORK = Counter(
    "keepwarm_store_lost_claims_total",
    "Claims answered by a worker that was not the first to receive them: an upper bound of those "
    "computed again because a worker was lost.",
)
DEAD = Counter(
    "keepwarm_store_dead_claims_total",
    "Dead claims committed, by reason.",
    ["reason"],
)
RETURNED = Counter(
    "keepwarm_store_returned_claims_total",
    "Claims that workers returned, as committed.",
)
REFUSED = Counter(
    "keepwarm_store_refused_messages_total",
    "Messages that could not be used and went to dead-messages.",
)
COMMIT_SECONDS = Histogram(
    "keepwarm_store_commit_seconds",
    "Duration of a transaction, whether it was committed or failed.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
COMMIT_FAILURES = Counter(
    "keepwarm_store_commit_failures_total",
    "Transactions that failed and were tried again.",
)
WAITING = Gauge(
    "keepwarm_store_waiting",
    "Whether a failed transaction is being retried (1) or not (0).",
)
LAG_SECONDS = Histogram(
    "keepwarm_store_lag_seconds",
    "Time from a message's arrival at the collector to its commit.",
    buckets=(0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
COLD_START_SECONDS = Histogram(
    "keepwarm_cold_start_seconds",
    "Duration of each measured phase of an engine's start; `total` is the whole start.",
    ["phase"],
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800),
)
WARM_ATTACHES = Counter(
    "keepwarm_warm_attaches_total",
    "Times that a worker found its context warm.",
)
PREEMPTIONS = Counter(
    "keepwarm_preemptions_total",
    "Workers that ended, by kind: a signal, the walltime, a failure, or `vanished` without notice.",
    ["kind"],
)

UNLISTED = Gauge(
    "keepwarm_unlisted_workers",
    "Workers that the last answer of /sd left out, because it lists at most 10,000.",
)

# A series that starts with its first event hides that event: Prometheus sees no increase.
for _kind in (*get_args(Ending), "vanished"):
    PREEMPTIONS.labels(_kind)
for _reason in DeadReason:
    DEAD.labels(_reason.value)
for _correct in ("true", "false"):
    JUDGED.labels(_correct)
for _phase in StartupPhases.model_fields:
    COLD_START_SECONDS.labels(_phase)


def count_commit(incoming: Incoming, fresh: int) -> None:
    """Count a committed transaction; `fresh` of its verdicts were the first of their claims."""
    answered = 0
    for batch in incoming.verdicts:
        answered += len(batch.verdicts)
        kinds = Counts((verdict.label, verdict.gold) for verdict in batch.verdicts)
        for (label, gold), number in kinds.items():
            VERDICTS.labels(_device(batch.device), _label(label)).inc(number)
            if gold is not None:
                JUDGED.labels("true" if label == gold else "false").inc(number)
        if batch.attempt > 1:
            LOST_WORK.inc(len(batch.verdicts))
    DUPLICATES.inc(answered - fresh)
    for dead in incoming.dead:
        DEAD.labels(dead.reason.value).inc()
    RETURNED.inc(sum(len(batch.claims) for batch in incoming.returned))
    for ready in incoming.startups:
        if ready.warm:
            WARM_ATTACHES.inc()
            continue
        for phase in StartupPhases.model_fields:
            seconds = getattr(ready.phases, phase)
            if seconds is not None:
                COLD_START_SECONDS.labels(phase).observe(seconds)
