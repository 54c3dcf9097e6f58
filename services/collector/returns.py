"""What workers give back, put onto its claims queue again: the one way back for a claim."""

import structlog

from services.broker import Consumer, Delivery, Outgoing, Publisher
from services.collector.store import Store
from services.contracts import ClaimBatch, topology
from services.contracts.errors import MessageInvalid

log = structlog.get_logger(__name__)


class NotAnnounced(MessageInvalid):
    """No producer announced the submission, or not yet: announcements have a queue of their own."""


def send_on(
    batch: ClaimBatch,
    delivery: Delivery,
    store: Store,
    consumer: Consumer,
    publisher: Publisher,
) -> None:
    """Publish those claims of a returned batch that are still wanted, and acknowledge it once the
    broker has them.

    Raises NotAnnounced, for workers cannot make work; MessageInvalid; StoreError when the store
    cannot say what is wanted.
    """
    run_id = batch.run.run_id
    wanted = store.wants(batch.submission_id)
    if wanted is None:
        raise NotAnnounced(
            f"claims were returned of a submission of {run_id} that nobody announced"
        )
    done = store.finished(run_id, [claim.claim_id for claim in batch.claims]) if wanted else set()
    claims = tuple(claim for claim in batch.claims if wanted and claim.claim_id not in done)
    log.info("claims.returned", run=run_id, claims=len(batch.claims), sent_on=len(claims))
    if not claims:
        consumer.acknowledge([delivery])
        return
    context_id = batch.run.context.context_id
    publisher.also_declare(context_id)
    publisher.publish(
        Outgoing.of(
            batch.model_copy(update={"claims": claims}),
            topology.CLAIMS_EXCHANGE,
            topology.claims_queue(context_id),
            message_id=delivery.message_id,
            headers=delivery.history,
            on_confirmed=lambda: consumer.acknowledge([delivery]),
        )
    )
