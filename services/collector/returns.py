"""What workers give back, put onto its claims queue again: the one way back for a claim."""

import structlog

from services.broker import Consumer, Delivery, Outgoing, Publisher
from services.collector.store import Store
from services.contracts import ClaimBatch, topology

log = structlog.get_logger(__name__)


def send_on(
    batch: ClaimBatch,
    delivery: Delivery,
    store: Store,
    consumer: Consumer,
    publisher: Publisher,
) -> None:
    """Publish those claims of a returned batch that are still wanted, and acknowledge it once the
    broker has them. The batch is one that `Submissions.checked` has let through.

    Raises MessageInvalid; StoreError when the store cannot say what is wanted.
    """
    run_id = batch.run.run_id
    wanted: list[int] = []
    if store.wants(batch.submission_id):
        done = store.finished(run_id, [claim.claim_id for claim in batch.claims])
        places = {claim.claim_id: place for place, claim in enumerate(batch.claims)}
        wanted = [place for claim_id, place in places.items() if claim_id not in done]
    log.info("claims.returned", run=run_id, claims=len(batch.claims), sent_on=len(wanted))
    if not wanted:
        consumer.acknowledge([delivery])
        return
    context_id = batch.run.context.context_id
    publisher.also_declare(context_id)
    publisher.publish(
        Outgoing.of(
            batch.only(wanted),
            topology.CLAIMS_EXCHANGE,
            topology.claims_queue(context_id),
            message_id=delivery.message_id,
            headers=delivery.history,
            on_confirmed=lambda: consumer.acknowledge([delivery]),
        )
    )
