"""The names on the broker. What is declared there, and how, is `services.broker.topology`.

An exchange per direction, so that a user's right to write can be given for one of them alone.
Workers give claims back through `keepwarm.returns` to the collector, which alone puts them on a
claims queue again: a worker's password is not enough to make others work.
"""

CLAIMS_EXCHANGE = "keepwarm.claims"
RETURNS_EXCHANGE = "keepwarm.returns"
VERDICTS_EXCHANGE = "keepwarm.verdicts"
RUNS_EXCHANGE = "keepwarm.runs"
DEAD_EXCHANGE = "keepwarm.dead"
CONTROL_EXCHANGE = "keepwarm.notices"
"""To every worker that listens: what the collector wants all of them to know."""
HEARTBEATS_EXCHANGE = "keepwarm.presence"
"""To every collector that listens: which workers there are. What nobody hears is gone."""
DIRECT_EXCHANGES = (
    CLAIMS_EXCHANGE,
    RETURNS_EXCHANGE,
    VERDICTS_EXCHANGE,
    RUNS_EXCHANGE,
    DEAD_EXCHANGE,
)
CORE_EXCHANGES = (*DIRECT_EXCHANGES, CONTROL_EXCHANGE, HEARTBEATS_EXCHANGE)

RETURNS_QUEUE = "returns"
VERDICTS_QUEUE = "verdicts"
RUNS_QUEUE = "runs"
DEAD_CLAIMS_QUEUE = "dead-claims"
DEAD_MESSAGES_QUEUE = "dead-messages"
CORE_QUEUES = (RUNS_QUEUE, VERDICTS_QUEUE, RETURNS_QUEUE, DEAD_CLAIMS_QUEUE, DEAD_MESSAGES_QUEUE)
"""Those that are there whatever is verified."""

FAILURES_HEADER = "keepwarm-failures"
"""How many failures of an engine a returned batch's claims were part of."""
DECLINED_HEADER = "keepwarm-declined"
"""The engines that could not answer a returned batch's claims, each with what it said of them."""
WAITED_HEADER = "keepwarm-waited-seconds"
"""How long these claims have waited at those engines for another one to take them."""
REASON_HEADER = "keepwarm-reason"
"""Why a message could not be used; on those in `dead-messages`."""
ORIGIN_HEADER = "keepwarm-origin"
"""The queue that a message in `dead-messages` was taken from."""


def claims_queue(context_id: str) -> str:
    """The queue of the claims that want one context; also their routing key."""
    return f"claims.{context_id}"


def listener_queue(exchange: str, listener: str) -> str:
    """A listener's own queue for what a fanout says: `notices.…`, `presence.…`."""
    return f"{exchange.removeprefix('keepwarm.')}.{listener}"
