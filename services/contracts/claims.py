"""Claims, and the message that carries them to a worker."""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.contracts.bounds import (
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

    def only(self, indexes: Sequence[int]) -> Self:
        """The same batch with only the claims at these indexes."""
        return self.model_copy(
            update={
                "claims": tuple(self.claims[index] for index in indexes),
                "proofs": tuple(self.proofs[index] for index in indexes) if self.proofs else (),
            }
        )
