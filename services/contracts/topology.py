"""The names on the broker. What is declared there, and how, is `services.broker.topology`.

An exchange per direction, so that a user's right to write can be given for one of them alone.
"""

CLAIMS_EXCHANGE = "keepwarm.claims"
VERDICTS_EXCHANGE = "keepwarm.verdicts"
RUNS_EXCHANGE = "keepwarm.runs"
DEAD_EXCHANGE = "keepwarm.dead"

VERDICTS_QUEUE = "verdicts"
RUNS_QUEUE = "runs"
DEAD_CLAIMS_QUEUE = "dead-claims"
DEAD_MESSAGES_QUEUE = "dead-messages"


def claims_queue(context_id: str) -> str:
    """The queue of the claims that want one context; also their routing key."""
    return f"claims.{context_id}"
