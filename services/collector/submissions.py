"""What producers announced, and whether what workers say is about it."""

from collections.abc import Iterable, Sequence

from services.contracts import ClaimBatch, DeadClaim, Run, RunAnnouncement, VerdictBatch
from services.contracts.errors import MessageInvalid
from services.contracts.proofs import all_equal, claim_proof, split_verdict_proof
from services.contracts.wire import Message
from services.store.store import Store

_MOST_KNOWN = 1_000


class NotAnnounced(MessageInvalid):
    """No producer announced the submission, or not yet: announcements have a queue of their own."""


class Submissions:
    """The submissions that the store knows, those used lately at hand.

    Of what a worker says, the run comes from here, and each claim has to have its producer's proof.
    A submission without a key was announced by an older producer: its claims are believed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[Run, bytes | None]] = {}
        self._unproven: set[str] = set()

    def checked(self, message: Message) -> Message:
        """A message from a queue, as far as it can be believed. Raises NotAnnounced; MessageInvalid
        where it is about what nobody announced, or a claim that the run does not have; StoreError.
        """
        match message:
            case RunAnnouncement():
                self.note(message)
            case VerdictBatch():
                self.check_verdicts(message)
            case DeadClaim():
                self.check_dead(message)
            case ClaimBatch():
                return self.check_returned(message)
        return message

    def note(self, announcement: RunAnnouncement) -> None:
        """It is to be written in the transaction that is being gathered."""
        if self._find(announcement.submission_id) is None:  # the first word on it counts
            self._keep(announcement.submission_id, announcement.run, announcement.proof_key)
        if announcement.proof_key is None:
            self._unproven.add(announcement.run.run_id)

    def check_verdicts(self, batch: VerdictBatch) -> None:
        key = self._key(batch.submission_id, batch.run_id)
        if key is None:
            return
        carried = [split_verdict_proof(proof) for proof in batch.proofs]
        expected = (
            claim_proof(key, one.claim_id, one.position, one.text, one.gold, evidence)
            for one, (_, evidence) in zip(batch.verdicts, carried, strict=False)
        )
        _compare([proof for proof, _ in carried], expected, batch.run_id)

    def check_dead(self, dead: DeadClaim) -> None:
        key = self._key(dead.submission_id, dead.run_id)
        if key is not None:
            _compare([dead.proof or ""], [dead.claim.proof(key)], dead.run_id)

    def check_returned(self, batch: ClaimBatch) -> ClaimBatch:
        """The batch with the run that was announced, whichever it says that it has."""
        known = self._find(batch.submission_id)
        if known is None:
            raise NotAnnounced(
                f"claims were returned of a submission of {batch.run.run_id} that nobody announced"
            )
        run, key = known
        if key is not None:
            _compare(batch.proofs, (claim.proof(key) for claim in batch.claims), run.run_id)
        return batch if batch.run == run else batch.model_copy(update={"run": run})

    def _key(self, submission_id: str | None, run_id: str) -> bytes | None:
        """That of the submission; None where it has none."""
        if submission_id is None:
            if run_id not in self._unproven:
                takes = self._store.takes_unproven(run_id)
                if takes is None:
                    raise NotAnnounced(f"{run_id} was not announced by a producer")
                if not takes:
                    raise MessageInvalid(f"it proves nothing, and every claim of {run_id} does")
                if len(self._unproven) >= _MOST_KNOWN:
                    self._unproven.clear()
                self._unproven.add(run_id)
            return None
        known = self._find(submission_id)
        if known is None:
            raise NotAnnounced(f"a submission of {run_id} was not announced by a producer")
        run, key = known
        if run.run_id != run_id:
            raise MessageInvalid(f"its submission is one of {run.run_id}, not of {run_id}")
        return key

    def _find(self, submission_id: str) -> tuple[Run, bytes | None] | None:
        if submission_id not in self._known:
            found = self._store.submission(submission_id)
            if found is None:
                return None
            self._keep(submission_id, *found)
        return self._known[submission_id]

    def _keep(self, submission_id: str, run: Run, proof_key: str | None) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[submission_id] = run, bytes.fromhex(proof_key) if proof_key else None


def _compare(carried: Sequence[str], expected: Iterable[str], run_id: str) -> None:
    if not carried or not all_equal(carried, expected):
        raise MessageInvalid(
            f"it is about a claim that {run_id} does not have, or has otherwise: its proof is not "
            "the producer's"
        )
