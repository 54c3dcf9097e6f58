"""What is counted of connections and of messages on them."""

from prometheus_client import Counter, Gauge

CONNECTED = Gauge(
    "keepwarm_broker_connected",
    "Whether the link to the broker is open (1) or not (0).",
    ["link"],
)
RECONNECTS = Counter(
    "keepwarm_broker_reconnects_total",
    "Times that the link was in service again after it had been lost.",
    ["link"],
)
BLOCKED = Gauge(
    "keepwarm_broker_blocked",
    "Whether an alarm of the broker (memory, disk) blocks publishing on the link (1) or not (0).",
    ["link"],
)
UNCONFIRMED = Gauge(
    "keepwarm_broker_unconfirmed_messages",
    "Messages handed to the link that the broker has not confirmed yet.",
    ["link"],
)
REDELIVERED = Counter(
    "keepwarm_broker_redelivered_messages_total",
    "Messages that came to the link again, after somebody had them and did not settle them.",
    ["link"],
)
