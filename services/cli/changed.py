"""Refuses a file that was changed while its run is unfinished: it would be another run."""

from typing import TYPE_CHECKING

from services.contracts import Claim, Run
from services.contracts.errors import InputError
from services.producer import Submission

if TYPE_CHECKING:  # not every machine that submits has a store
    from services.store import RunStatus, Store

_SAME = ("source", "context", "prompt", "limit", "seed")


def refuse_changed_file(submission: Submission, store: "Store") -> None:
    """Raises InputError, with the difference, when the store has an unfinished run of a file of the
    same name, verified in the same way, with other content. The user means to complete that run,
    and would start another.
    """
    from services.store import known_runs, run_status

    for run in (known.run for known in known_runs(store)):
        if run is None or not _changed(run, submission.run):
            continue
        status = run_status(store, run.run_id)
        if status is not None and not status.complete and not status.cancelled:
            flag = submission.file.differing_flag(run.source_digest)
            what = (
                f"is read with another {flag}"
                if flag
                else "has changed, or is read with other flags (--column, --format, "
                "--each-evidence, --corpus),"
            )
            raise InputError(
                f"{run.source} {what} since it was submitted as {run.run_id}, which is "
                f"unfinished: {_difference(submission, status, store)}. To complete that run, "
                "submit the original file with the same flags. To start a new run, first run "
                f"`keepwarm cancel {run.run_id}`"
            )


def _changed(earlier: Run, now: Run) -> bool:
    """Whether only the file's content differs."""
    alike = all(getattr(earlier, name) == getattr(now, name) for name in _SAME)
    return alike and earlier.source_digest != now.source_digest


def _difference(submission: Submission, status: "RunStatus", store: "Store") -> str:
    answered = status.done + status.dead
    same, first = 0, ""
    for claims in submission.claims():
        texts = store.texts(status.run_id, [claim.claim_id for claim in claims])
        changed = [claim for claim in claims if texts.get(claim.claim_id, claim.text) != claim.text]
        same += len(texts) - len(changed)
        first = first or (_named(changed[0]) if changed else "")
    then = ""
    if status.total is not None:
        then = f"{status.total + (status.repeated or 0) + (status.rejected or 0):,} lines then, "
    example = f", first {first}" if first else ""
    return (
        f"{then}{submission.file.records_to_read:,} lines now; of its {answered:,} claims with an "
        f"outcome {answered - same:,} have another text or are missing{example}"
    )


def _named(claim: Claim) -> str:
    return f"{claim.claim_id!r} in line {claim.position + 1}"
