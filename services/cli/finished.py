"""Prepares a store for a file's run: finished claims, foreign claims, gold labels."""

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
    """Remove outcomes of claims that are not in the file, when the run has as many outcomes as
    claims but they are not those of its claims.
    """
    from services.store import run_status  # installed, since there is a store

    run_id = submission.run.run_id
    status = run_status(store, run_id)
    if status is None or status.proven is not False:
        return
    ids = store.remove_foreign(run_id, chain.from_iterable(submission.claims()))
    shown = ", ".join(repr(claim_id) for claim_id in ids[:_SHOWN_IDS])
    more = ", …" if len(ids) > _SHOWN_IDS else ""
    say(
        console,
        f"Removed {len(ids):,} outcomes of claims that are not in the file: {shown}{more}",
    )


def update_gold(submission: Submission, store: "Store") -> None:
    """Update the gold labels of claims that have an outcome. The user may name the label column or
    map a label after the claims are computed.
    """
    summary = submission.input
    if summary is None or not (summary.gold or summary.unknown_labels):
        return  # without labels in the file, those in the store stay
    from services.store import run_status  # installed, since there is a store

    run_id = submission.run.run_id
    status = run_status(store, run_id)
    if status is None or not status.done + status.dead:
        return  # no outcome to update: do not read the file again
    store.set_input(run_id, summary)
    for claims in submission.claims():
        store.set_gold(run_id, {claim.claim_id: claim.gold for claim in claims})


def nothing_finished(_: Sequence[Claim]) -> Collection[str]:
    return ()
