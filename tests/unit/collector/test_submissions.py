"""What workers say is believed as far as the store bears it out, or a producer's proof does."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.collector.submissions import NotAnnounced, Submissions
from services.contracts import ClaimBatch, DeadClaim, Run, RunAnnouncement, VerdictBatch
from services.contracts.errors import MessageInvalid
from services.contracts.proofs import verdict_proof
from services.store import Store

KEY_TEXT = "00112233445566778899aabbccddeeff"
KEY = bytes.fromhex(KEY_TEXT)
SUBMISSION = "sub-proven"


@pytest.fixture
def announcement(run: Run) -> RunAnnouncement:
    return RunAnnouncement(run=run, submission_id=SUBMISSION, proof_key=KEY_TEXT)


@pytest.fixture
def submissions(store: Store, announcement: RunAnnouncement, make: SimpleNamespace) -> Submissions:
    store.write(make.incoming(announcement))
    return Submissions(store)


@pytest.fixture
def verdicts(make: SimpleNamespace) -> VerdictBatch:
    claims = [make.claim(number) for number in (1, 2)]
    return make.batch(
        *(make.verdict(number, gold="B B") for number in (1, 2)),
        submission_id=SUBMISSION,
        proofs=tuple(verdict_proof(claim.proof(KEY), claim.evidence) for claim in claims),
    )


@pytest.fixture
def dead(make: SimpleNamespace) -> DeadClaim:
    return make.dead(1, submission_id=SUBMISSION, proof=make.claim(1).proof(KEY))


@pytest.fixture
def returned(make: SimpleNamespace) -> ClaimBatch:
    batch = make.returned(1, 2, submission_id=SUBMISSION)
    return batch.model_copy(update={"proofs": tuple(claim.proof(KEY) for claim in batch.claims)})


def test_what_is_proven_is_taken(
    submissions: Submissions, verdicts: VerdictBatch, dead: DeadClaim, returned: ClaimBatch
) -> None:
    submissions.check_verdicts(verdicts)
    submissions.check_dead(dead)
    assert submissions.checked(returned) == returned


@pytest.mark.parametrize(
    "changes",
    [
        {"claim_id": "c-foreign"},
        {"position": 99},
        {"text": "Another claim."},
        {"gold": "A"},
        {"gold": None},
    ],
    ids=str,
)
def test_a_verdict_on_a_claim_that_the_run_does_not_have_is_refused(
    changes: dict[str, Any], submissions: Submissions, verdicts: VerdictBatch
) -> None:
    changed = verdicts.verdicts[1].model_copy(update=changes)
    with pytest.raises(MessageInvalid, match="a claim is not one of run-"):
        submissions.check_verdicts(
            verdicts.model_copy(update={"verdicts": (verdicts.verdicts[0], changed)})
        )


def test_a_verdict_with_a_label_that_the_prompt_does_not_have_is_refused(
    submissions: Submissions, verdicts: VerdictBatch
) -> None:
    forged = verdicts.verdicts[1].model_copy(update={"label": "NOT A LABEL"})
    for changes in (
        {"verdicts": (verdicts.verdicts[0], forged)},
        {"labels": (*verdicts.labels[:-1], "NOT A LABEL")},
    ):
        with pytest.raises(MessageInvalid, match="a label that the prompt of run-.* does not have"):
            submissions.check_verdicts(verdicts.model_copy(update=changes))


@pytest.mark.parametrize(
    "changes",
    [{"text": "Ignore it."}, {"evidence": "Other."}, {"evidence": None}, {"claim_id": "c9"}],
    ids=str,
)
def test_a_returned_claim_that_was_changed_is_refused(
    changes: dict[str, Any], submissions: Submissions, returned: ClaimBatch, dead: DeadClaim
) -> None:
    changed = returned.claims[0].model_copy(update=changes)
    with pytest.raises(MessageInvalid, match="its proof does not match the producer's"):
        submissions.checked(returned.model_copy(update={"claims": (changed, returned.claims[1])}))
    with pytest.raises(MessageInvalid, match="its proof does not match the producer's"):
        submissions.check_dead(dead.model_copy(update={"claim": changed}))


def test_what_lacks_its_proof_is_refused(
    submissions: Submissions, verdicts: VerdictBatch, dead: DeadClaim, returned: ClaimBatch
) -> None:
    for check, message, changes in (
        (submissions.check_verdicts, verdicts, {"proofs": ()}),
        (submissions.check_dead, dead, {"proof": None}),
        (submissions.checked, returned, {"proofs": ()}),
    ):
        with pytest.raises(MessageInvalid, match="its proof does not match the producer's"):
            check(message.model_copy(update=changes))
    for check, message in ((submissions.check_verdicts, verdicts), (submissions.check_dead, dead)):
        with pytest.raises(MessageInvalid, match="it has no proofs, and every claim of run-"):
            check(message.model_copy(update={"submission_id": None}))


def test_the_run_of_a_returned_batch_is_the_one_that_was_announced(
    submissions: Submissions, returned: ClaimBatch, run: Run, other_run: Run
) -> None:
    forged = returned.model_copy(update={"run": other_run})
    assert submissions.checked(forged).run == run


def test_a_verdict_cannot_be_attributed_to_another_run(
    submissions: Submissions, verdicts: VerdictBatch, other_run: Run
) -> None:
    with pytest.raises(MessageInvalid, match="its submission is of run-"):
        submissions.check_verdicts(verdicts.model_copy(update={"run_id": other_run.run_id}))


def test_what_nobody_announced_has_to_wait_until_somebody_does(
    store: Store,
    verdicts: VerdictBatch,
    dead: DeadClaim,
    returned: ClaimBatch,
    announcement: RunAnnouncement,
) -> None:
    submissions = Submissions(store)
    unproven = verdicts.model_copy(update={"submission_id": None, "proofs": ()})
    for check, message in (
        (submissions.check_verdicts, verdicts),
        (submissions.check_verdicts, unproven),
        (submissions.check_dead, dead),
        (submissions.checked, returned),
    ):
        with pytest.raises(NotAnnounced):
            check(message)
    submissions.note(announcement)  # not committed yet
    submissions.check_verdicts(verdicts)
    submissions.check_dead(dead)
    assert submissions.checked(returned) == returned


def test_the_first_key_of_a_submission_stays(
    submissions: Submissions, announcement: RunAnnouncement, verdicts: VerdictBatch
) -> None:
    submissions.note(announcement.model_copy(update={"proof_key": "0" * 32}))
    submissions.check_verdicts(verdicts)


def test_a_run_that_an_older_producer_sent_is_taken_without_proofs(
    submissions: Submissions, store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced()))
    submissions.check_verdicts(make.batch(make.verdict(1)))
    submissions.check_dead(make.dead(2))
    batch = make.returned(3)
    assert submissions.checked(batch) == batch
