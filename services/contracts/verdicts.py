"""Verdicts and dead claims, and the messages that carry them to the collector."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.contracts.bounds import (
    MAX_BATCH_CLAIMS,
    MAX_LABELS,
    BatchId,
    ClaimText,
    Detail,
    GeneratedId,
    Identity,
    Int31,
    Int63,
    Name,
    RawText,
    ReasoningText,
)
from services.contracts.claims import Claim
from services.contracts.prompts import LabelName
from services.contracts.proofs import Proof, Proofs
from services.contracts.values import Value
from services.contracts.wire import Message

Probability = Annotated[float, Field(ge=0, le=1)]
Attempt = Annotated[Int31, Field(ge=1)]


class Verdict(Value):
    """The model's answer to one claim.

    `probabilities` are over the label words only (they sum to 1), in the order of the batch's
    `labels`; empty if no answer could be read. `mass` is the share of the whole next-token
    probability that the label words have. `raw_text` is the text that the model would generate.
    The claim's text, position and gold label are included, so that the store needs no other source.
    """

    claim_id: Identity
    position: Int63
    text: ClaimText
    gold: LabelName | None = None
    label: LabelName
    probabilities: Annotated[tuple[Probability, ...], Field(max_length=MAX_LABELS)]
    mass: Probability
    raw_text: RawText
    prompt_tokens: Int31
    reasoning: Annotated[ReasoningText | None, Field(exclude_if=lambda text: text is None)] = None
    """What the model wrote first, cut to its bound; None if the prompt asks for no reasoning."""
    reasoning_tokens: Annotated[Int31, Field(exclude_if=lambda count: not count)] = 0
    """The tokens that the model wrote first."""


_Submission = Annotated[Identity | None, Field(exclude_if=lambda value: value is None)]
"""The submission of these claims, sent with their proofs."""


MAX_ENGINE_SECONDS = 7 * 24 * 3600.0
"""Of one request. Without a limit, one forged value would spoil the speed in every report."""


class VerdictBatch(Message):
    """The verdicts of one batch of claims, by one worker, from one request to its engine.

    `proofs` are the `verdict_proof` of each claim.
    """

    run_id: GeneratedId
    batch_id: BatchId
    labels: Annotated[tuple[LabelName, ...], Field(min_length=2, max_length=MAX_LABELS)]
    verdicts: Annotated[tuple[Verdict, ...], Field(min_length=1, max_length=MAX_BATCH_CLAIMS)]
    worker_id: GeneratedId
    device: Name
    attempt: Attempt
    engine_seconds: Annotated[float, Field(ge=0, le=MAX_ENGINE_SECONDS)]
    submission_id: _Submission = None
    proofs: Proofs = ()

    @model_validator(mode="after")
    def _each_verdict_has_a_proof(self) -> Self:
        if self.proofs and len(self.proofs) != len(self.verdicts):
            raise ValueError("there must be a proof for each verdict, or none at all")
        return self

    @model_validator(mode="after")
    def _scores_fit_the_labels(self) -> Self:
        sizes = {len(verdict.probabilities) for verdict in self.verdicts}
        if not sizes <= {0, len(self.labels)}:
            raise ValueError("a verdict's probabilities must be one for each label, or none at all")
        return self


class DeadReason(StrEnum):
    """Why a claim is dead."""

    TOO_LONG = "too-long"
    PROMPT_UNUSABLE = "prompt-unusable"
    ENGINE_REFUSED = "engine-refused"
    ENGINE_FAILED = "engine-failed"
    """The engine failed with this claim repeatedly, alone, and not with a canary."""
    WORKER_FAILED = "worker-failed"
    """The worker's own code failed or crashed with it repeatedly, and not with a canary."""


class DeadClaim(Message):
    """A claim given up on, with its reason: the outcome of a claim that can have no verdict."""

    run_id: GeneratedId
    claim: Claim
    reason: DeadReason
    detail: Detail
    worker_id: GeneratedId
    attempt: Attempt
    failures: Int31 = 0
    """Engine failures that the claim was part of."""
    submission_id: _Submission = None
    proof: Annotated[Proof | None, Field(exclude_if=lambda proof: proof is None)] = None
