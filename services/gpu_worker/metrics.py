"""What is counted of a worker's batches, and of its device's time."""

from prometheus_client import Counter, Gauge, Histogram

VERDICTS = Counter(
    "keepwarm_verdicts_total",
    "Verdicts published by this worker, by their label; after 64 labels all others are `other`.",
    ["label"],
)
INVALID_VERDICTS = Counter(
    "keepwarm_verdicts_invalid_total",
    "Verdicts whose answer could not be read (they are among keepwarm_verdicts_total as INVALID).",
)
DEAD = Counter(
    "keepwarm_claims_dead_total",
    "Claims that this worker gave up on, by reason.",
    ["reason"],
)
RETURNED = Counter(
    "keepwarm_claims_returned_total",
    "Claims given back unharmed: beyond the horizon (trimmed), not answerable by this engine "
    "(declined), or not finished (unfinished).",
    ["why"],
)
REDELIVERED = Counter(
    "keepwarm_claims_redelivered_total",
    "Claims that came after somebody else had them and did not settle them.",
)
CANCELLED = Counter(
    "keepwarm_claims_cancelled_total",
    "Claims dropped because nobody wants their submission any more.",
)
SUSPECTS = Counter(
    "keepwarm_batches_suspect_total",
    "Batches that the engine failed with, here or elsewhere before.",
)
IN_HAND = Gauge(
    "keepwarm_batches_in_hand",
    "Batches taken and not settled yet.",
)
BATCH_SECONDS = Histogram(
    "keepwarm_batch_seconds",
    "How long a batch was in a phase: waiting for a thread, inferring, confirming.",
    ["phase"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
DEVICE_SECONDS = Counter(
    "keepwarm_device_seconds_total",
    "Seconds of the device by use: inferring, loading a context, idle, or lost, that is computed "
    "without an answer that counts.",
    ["device", "use"],
)
