"""Claims, and the message that carries them to a worker."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.contracts.bounds import (
    MAX_BATCH_BYTES,
    MAX_BATCH_CLAIMS,
    BatchId,
    ClaimText,
    EvidenceText,
    GeneratedId,
    Identity,
    Int63,
)
from services.contracts.prompts import LabelName
from services.contracts.proofs import Proofs, claim_proof, evidence_digest
from services.contracts.runs import Run
from services.contracts.values import Value
from services.contracts.wire import Message

_OWN_ID_SUFFIX = re.compile(r"#[0-9a-f]{8}$")
# The size of a claim's field names, numbers and proof, without its texts.
_CLAIM_OVERHEAD_BYTES = 130


class Claim(Value):
    """A statement to verify. `position` is its index in the input, from 0; results keep it."""

    claim_id: Identity
    position: Int63
    text: ClaimText
    evidence: EvidenceText | None = None
    gold: LabelName | None = None

    def proof(self, key: bytes) -> str:
        """Proves to the owner of the key that the producer made this claim unchanged."""
        return claim_proof(
            key,
            self.claim_id,
            self.position,
            self.text,
            self.gold,
            evidence_digest(self.evidence),
        )


class ClaimBatch(Message):
    """The claims in one message, with everything that a worker needs: a worker keeps no state."""

    run: Run
    submission_id: GeneratedId
    batch_id: BatchId
    claims: Annotated[tuple[Claim, ...], Field(min_length=1, max_length=MAX_BATCH_CLAIMS)]
    proofs: Proofs = ()

    @model_validator(mode="after")
    def _each_claim_has_a_proof(self) -> Self:
        if self.proofs and len(self.proofs) != len(self.claims):
            raise ValueError("there must be a proof for each claim, or none at all")
        return self

    @classmethod
    def with_proofs(
        cls, run: Run, submission_id: str, batch_id: str, claims: Iterable[Claim], key: bytes
    ) -> Self:
        """A batch of a producer, which has the submission's `key`."""
        claims = tuple(claims)
        return cls(
            schema_version=run.message_version,
            run=run,
            submission_id=submission_id,
            batch_id=batch_id,
            claims=claims,
            proofs=tuple(claim.proof(key) for claim in claims),
        )

    def only(self, indexes: Sequence[int]) -> Self:
        """The same batch with only the claims at these indexes."""
        return self.model_copy(
            update={
                "claims": tuple(self.claims[index] for index in indexes),
                "proofs": tuple(self.proofs[index] for index in indexes) if self.proofs else (),
            }
        )


def own_id_suffix(evidence: str) -> str:
    """What the producer adds to the id of a claim that another claim of the file has, with other
    evidence. From the content, so that the id does not depend on the records that `--limit` takes.
    """
    return "#" + hashlib.blake2b(evidence.encode(), digest_size=4).hexdigest()


def id_in_file(claim_id: str) -> str:
    """A claim's id without `own_id_suffix`."""
    return _OWN_ID_SUFFIX.sub("", claim_id)


def split_claims(claims: Iterable[Claim], batch_size: int) -> Iterator[list[Claim]]:
    """Lists of at most `batch_size` claims and about `MAX_BATCH_BYTES`."""
    batch: list[Claim] = []
    size = 0
    for claim in claims:
        # An upper bound: JSON may write a character as six bytes.
        longest = 6 * (len(claim.text) + len(claim.evidence or "") + len(claim.claim_id))
        longest += _CLAIM_OVERHEAD_BYTES
        if batch and (len(batch) == batch_size or size + longest > MAX_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(claim)
        size += longest
    if batch:
        yield batch
