"""Metrics of connections to the broker and of the messages on them."""

from prometheus_client import Counter, Gauge

CONNECTED = Gauge(
    "keepwarm_broker_connected",
    "Whether the link to the broker is open (1) or not (0).",
    ["link"],
)
RECONNECTS = Counter(
    "keepwarm_broker_reconnects_total",
    "Times that the link was opened again after its connection was lost.",
    ["link"],
)
BLOCKED = Gauge(
    "keepwarm_broker_blocked",
    "Whether an alarm of the broker (memory, disk) blocks publishing on the link (1) or not (0).",
    ["link"],
)
UNCONFIRMED = Gauge(
    "keepwarm_broker_unconfirmed_messages",
    "Messages passed to the link that the broker has not confirmed yet.",
    ["link"],
)
REDELIVERED = Counter(
    "keepwarm_broker_redelivered_messages_total",
    "Messages that the broker delivered again, because a consumer did not settle them.",
    ["link"],
)
