"""Metrics of a submission."""

from prometheus_client import Counter

PUBLISHED = Counter(
    "keepwarm_claims_published_total",
    "Claims that this producer has sent to the broker.",
)
LINES = Counter(
    "keepwarm_lines_read_total",
    "Lines read, by result: claim, repeated, or rejected.",
    ["became"],
)
