"""Which claims need not be sent again, asked of the store on the producer's behalf."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from services.contracts import Claim
from services.producer.submission import Finished

if TYPE_CHECKING:  # not every machine that submits has a store
    from services.collector import Store


def finished_in(store: "Store", run_id: str) -> Finished:
    def finished(claims: Sequence[Claim]) -> Collection[str]:
        return store.finished(run_id, [claim.claim_id for claim in claims])

    return finished


def nothing_finished(_: Sequence[Claim]) -> Collection[str]:
    return ()
