"""Claims on their way to a worker."""

from typing import Annotated

from pydantic import Field

from services.contracts.bounds import (
    MAX_BATCH_CLAIMS,
    BatchId,
    ClaimText,
    EvidenceText,
    Identity,
    Int63,
    OwnId,
)
from services.contracts.prompts import LabelName
from services.contracts.runs import Run
from services.contracts.values import Value
from services.contracts.wire import Message


class Claim(Value):
    """A statement to verify. `position` is its place in the input, from 0: results keep it."""

    claim_id: Identity
    position: Int63
    text: ClaimText
    evidence: EvidenceText | None = None
    gold: LabelName | None = None


class ClaimBatch(Message):
    """The claims in one message, with all that a worker needs: it has no memory to lose."""

    run: Run
    submission_id: OwnId
    batch_id: BatchId
    claims: Annotated[tuple[Claim, ...], Field(min_length=1, max_length=MAX_BATCH_CLAIMS)]
