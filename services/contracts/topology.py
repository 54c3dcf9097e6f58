"""Names of exchanges, queues and headers. `services.broker.declarations` declares them.

There is an exchange for each direction, so that a user can be permitted to write to one of them
only. Workers return claims through `keepwarm.returns`, and only the collector publishes them to a
claims queue again: a worker's password does not permit anyone to create work for other workers.
"""

CLAIMS_EXCHANGE = "keepwarm.claims"
RETURNS_EXCHANGE = "keepwarm.returns"
VERDICTS_EXCHANGE = "keepwarm.verdicts"
RUNS_EXCHANGE = "keepwarm.runs"
DEAD_EXCHANGE = "keepwarm.dead"
CONTROL_EXCHANGE = "keepwarm.notices"
"""A fanout from the collector to every worker: control updates."""
HEARTBEATS_EXCHANGE = "keepwarm.presence"
"""A fanout from workers to every collector: heartbeats. Without a listener they are dropped."""
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
"""The queues that exist for any run; claims queues come in addition."""

FAILURES_HEADER = "keepwarm-failures"
"""How many engine failures the claims of a returned batch were part of."""
DECLINED_HEADER = "keepwarm-declined"
"""The engines that could not answer the claims of a returned batch, each after its reason."""
WAITED_HEADER = "keepwarm-waited-seconds"
"""How long these claims have waited at those engines for another engine."""
REASON_HEADER = "keepwarm-reason"
"""Why a message in `dead-messages` could not be used."""
ORIGIN_HEADER = "keepwarm-origin"
"""The queue from which a message in `dead-messages` came."""


def claims_queue(context_id: str) -> str:
    """The queue of one context's claims; also their routing key."""
    return f"claims.{context_id}"


def listener_queue(exchange: str, listener: str) -> str:
    """A listener's own queue at a fanout exchange: `notices.…`, `presence.…`."""
    return f"{exchange.removeprefix('keepwarm.')}.{listener}"
