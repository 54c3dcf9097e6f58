"""The announced submissions, and the check that workers' messages belong to them."""

from collections.abc import Iterable, Sequence

from services.contracts import (
    INVALID,
    ClaimBatch,
    DeadClaim,
    Run,
    RunAnnouncement,
    VerdictBatch,
)
from services.contracts.errors import MessageInvalid
from services.contracts.proofs import all_equal, claim_proof, split_verdict_proof
from services.contracts.wire import Message
from services.store.store import Store

_MAX_KNOWN = 1_000


class NotAnnounced(MessageInvalid):
    """No producer has announced the submission yet: announcements have their own queue."""


class Submissions:
    """The submissions in the store, with a cache of those used lately.

    A worker's message must carry the producer's proof of each claim, and its run is taken from the
    announcement. A submission without a key is of an older producer: its claims are accepted as
    they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[Run, bytes | None]] = {}
        self._unproven: set[str] = set()

    def checked(self, message: Message) -> Message:
        """The message, verified; a returned batch gets its announced run.

        Raises NotAnnounced; MessageInvalid if a claim is not one of the run's; StoreError.
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
        """Use an announcement before it is committed: others in its transaction may need it."""
        if self._find(announcement.submission_id) is None:  # the first one stays
            self._keep(announcement.submission_id, announcement.run, announcement.proof_key)
        if announcement.proof_key is None:
            self._unproven.add(announcement.run.run_id)

    def check_verdicts(self, batch: VerdictBatch) -> None:
        announced = self._proven(batch.submission_id, batch.run_id)
        if announced is None:
            return
        run, key = announced
        carried = [split_verdict_proof(proof) for proof in batch.proofs]
        expected = (
            claim_proof(key, one.claim_id, one.position, one.text, one.gold, evidence)
            for one, (_, evidence) in zip(batch.verdicts, carried, strict=False)
        )
        _compare([proof for proof, _ in carried], expected, batch.run_id)
        labels = run.prompt.label_names
        if batch.labels != labels or not {v.label for v in batch.verdicts} <= {*labels, INVALID}:
            raise MessageInvalid(
                f"a verdict has a label that the prompt of {batch.run_id} does not have"
            )

    def check_dead(self, dead: DeadClaim) -> None:
        announced = self._proven(dead.submission_id, dead.run_id)
        if announced is not None:
            _compare([dead.proof or ""], [dead.claim.proof(announced[1])], dead.run_id)

    def check_returned(self, batch: ClaimBatch) -> ClaimBatch:
        """The batch with the announced run in place of its own."""
        known = self._find(batch.submission_id)
        if known is None:
            raise NotAnnounced(
                f"no producer announced the submission of the returned claims of {batch.run.run_id}"
            )
        run, key = known
        if key is not None:
            _compare(batch.proofs, (claim.proof(key) for claim in batch.claims), run.run_id)
        return batch if batch.run == run else batch.model_copy(update={"run": run})

    def _proven(self, submission_id: str | None, run_id: str) -> tuple[Run, bytes] | None:
        """The submission's run and key; None if its claims have no proofs."""
        if submission_id is None:
            if run_id not in self._unproven:
                accepts = self._store.accepts_unproven(run_id)
                if accepts is None:
                    raise NotAnnounced(f"no producer announced {run_id}")
                if not accepts:
                    raise MessageInvalid(f"it has no proofs, and every claim of {run_id} has one")
                if len(self._unproven) >= _MAX_KNOWN:
                    self._unproven.clear()
                self._unproven.add(run_id)
            return None
        known = self._find(submission_id)
        if known is None:
            raise NotAnnounced(f"no producer announced this submission of {run_id}")
        run, key = known
        if run.run_id != run_id:
            raise MessageInvalid(f"its submission is of {run.run_id}, not of {run_id}")
        return None if key is None else (run, key)

    def _find(self, submission_id: str) -> tuple[Run, bytes | None] | None:
        if submission_id not in self._known:
            found = self._store.submission(submission_id)
            if found is None:
                return None
            self._keep(submission_id, *found)
        return self._known[submission_id]

    def _keep(self, submission_id: str, run: Run, proof_key: str | None) -> None:
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[submission_id] = run, bytes.fromhex(proof_key) if proof_key else None


def _compare(carried: Sequence[str], expected: Iterable[str], run_id: str) -> None:
    if not carried or not all_equal(carried, expected):
        raise MessageInvalid(
            f"a claim is not one of {run_id}, or differs from it: its proof does not match the "
            "producer's"
        )
