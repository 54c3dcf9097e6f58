"""Which claims need not be sent again, asked of the store on the producer's behalf."""

from collections.abc import Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from services.cli.screen import Screen, say
from services.contracts import Claim
from services.producer.submission import Finished, Submission

if TYPE_CHECKING:  # not every machine that submits has a store
    from services.store import Store

_SHOWN_IDS = 5


def finished_in(store: "Store", run_id: str) -> Finished:
    def finished(claims: Sequence[Claim]) -> Collection[str]:
        return store.finished(run_id, [claim.claim_id for claim in claims])

    return finished


def remove_foreign(submission: Submission, store: "Store", console: Screen) -> None:
    """Where as many claims have an outcome as the run has, and not the same ones, remove those that
    the file does not have: they took the place of others.
    """
    from services.store import run_status  # its extra is here: there is a store

    run_id = submission.run.run_id
    status = run_status(store, run_id)
    if status is None or status.proven is not False:
        return
    ids = store.remove_foreign(run_id, chain.from_iterable(submission.claims()))
    shown = ", ".join(repr(claim_id) for claim_id in ids[:_SHOWN_IDS])
    more = ", …" if len(ids) > _SHOWN_IDS else ""
    say(
        console,
        f"Removed {len(ids):,} outcomes of claims that the file does not have: {shown}{more}",
    )


def update_gold(submission: Submission, store: "Store") -> None:
    """Give claims that have an outcome already the gold labels that the file has now: a label's
    column may be named, or a label mapped, when everything is computed.
    """
    summary = submission.input
    if summary is None or not (summary.gold or summary.unknown_labels):
        return  # no labels are known, and that takes none away
    from services.store import run_status  # its extra is here: there is a store

    run_id = submission.run.run_id
    status = run_status(store, run_id)
    if status is None or not status.done + status.dead:
        return  # the file is not read once more for nothing
    store.set_input(run_id, summary)
    for claims in submission.claims():
        store.set_gold(run_id, {claim.claim_id: claim.gold for claim in claims})


def nothing_finished(_: Sequence[Claim]) -> Collection[str]:
    return ()
