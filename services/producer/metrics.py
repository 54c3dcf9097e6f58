"""What is counted of a submission."""

from prometheus_client import Counter

PUBLISHED = Counter(
    "keepwarm_claims_published_total",
    "Claims handed to the broker by this producer.",
)
LINES = Counter(
    "keepwarm_lines_read_total",
    "Lines read, by what became of them: claim, repeated, or rejected.",
    ["became"],
)
