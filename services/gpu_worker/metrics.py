"""Metrics of a worker's batches and of its device's time."""

from prometheus_client import Counter, Gauge, Histogram

VERDICTS = Counter(
    "keepwarm_verdicts_total",
    "Verdicts published by this worker, by their label; after 64 labels all others are `other`.",
    ["label"],
)
INVALID_VERDICTS = Counter(
    "keepwarm_verdicts_invalid_total",
    "Verdicts whose answer could not be read (also in keepwarm_verdicts_total, as INVALID).",
)
DEAD = Counter(
    "keepwarm_claims_dead_total",
    "Claims that this worker gave up on, by reason.",
    ["reason"],
)
RETURNED = Counter(
    "keepwarm_claims_returned_total",
    "Claims returned unharmed: more than can be finished in KEEPWARM_PREFETCH_SECONDS (trimmed), "
    "not answerable by this engine (declined), or not finished (unfinished).",
    ["why"],
)
REDELIVERED = Counter(
    "keepwarm_claims_redelivered_total",
    "Claims delivered again, after an earlier delivery was not settled.",
)
CANCELLED = Counter(
    "keepwarm_claims_cancelled_total",
    "Claims dropped because their submission was cancelled.",
)
QUARANTINED_BATCHES = Counter(
    "keepwarm_batches_suspect_total",
    "Batches quarantined because an engine failed with them, here or elsewhere.",
)
BATCHES_IN_FLIGHT = Gauge(
    "keepwarm_batches_in_flight",
    "Batches in flight: taken and not settled yet.",
)
BATCH_SECONDS = Histogram(
    "keepwarm_batch_seconds",
    "Seconds of a batch in each phase: waiting for a thread, inferring, confirming.",
    ["phase"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
DEVICE_SECONDS = Counter(
    "keepwarm_device_seconds_total",
    "Seconds of the device by use: inferring, loading a context, idle, or lost (computed without "
    "a usable answer).",
    ["device", "use"],
)
