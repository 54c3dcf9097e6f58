"""The run: claims x prompt x context, and what is known of its size."""

from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from services.contracts.bounds import (
    MAX_COUNTED,
    MAX_LEFT_OUT,
    Identity,
    Int63,
    Name,
    OwnId,
)
from services.contracts.contexts import ContextSpec
from services.contracts.prompts import PromptSpec
from services.contracts.proofs import DigestText, PositionsText, ProofKey
from services.contracts.values import Value, content_id
from services.contracts.wire import Message

_LEFT_OUT = Field(exclude_if=lambda value: value is None)
Counts = Annotated[tuple[tuple[Name, Int63], ...], Field(max_length=MAX_COUNTED)]
"""Kinds and how many there are of each, the most frequent first."""


class Run(Value):
    """One file of claims, put to one prompt on one context.

    `run_id` is made of content alone: the same lines, read in the same way, with the same prompt
    and context are the same run, wherever the file lies and however often it is submitted. (A
    local model's directory is part of its context: workers look for it there.)
    `source` (the file's name) is for people and not part of the identity.
    """

    source: Name
    source_digest: OwnId
    context: ContextSpec
    prompt: PromptSpec
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None

    @cached_property
    def run_id(self) -> str:
        return content_id(
            "run",
            {
                "source_digest": self.source_digest,
                "context": self.context.context_id,
                "prompt": self.prompt.prompt_id,
                "limit": self.limit,
                "seed": self.seed,
            },
        )


class Totals(Value):
    """What the producer made of the lines it read: `lines = claims + repeated + rejected`.

    A repeated line has the id and the content of an earlier one; it is counted once, as a claim.
    """

    lines: Int63
    claims: Int63
    repeated: Int63
    rejected: Int63

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.lines != self.claims + self.repeated + self.rejected:
            raise ValueError("lines must equal claims + repeated + rejected")
        return self


class InputSummary(Value):
    """What the producer found in a file: counts, each by a few words.

    `records` are those of the whole file, before `--limit`. `gold` counts the claims by label of
    the prompt, `unknown_labels` those whose label the prompt does not know, by the file's spelling:
    they are verified, and left out of the scores. `without_evidence` says why claims have none. Ids
    that are all whole numbers are exported as numbers.
    """

    format: Name
    container: Name
    records: Int63
    claims: Int63
    repeated: Int63
    rejected: Counts
    without_evidence: Counts
    gold: Counts
    unlabelled: Int63
    """Claims without a label; -1 says that there is one, which is kept back."""
    kept_back: Int63
    unknown_labels: Counts
    own_ids: Int63
    """Claims with an id made for them, because another has the same id with other evidence."""
    numeric_ids: bool
    evidence_partly_used: Annotated[Int63, Field(exclude_if=lambda count: not count)] = 0
    """Claims whose evidence has text that was not used."""
    same_content: Annotated[Int63, Field(exclude_if=lambda count: not count)] = 0
    """Claims whose text and evidence an earlier claim has under another id."""
    other_label: Annotated[Int63, Field(exclude_if=lambda count: not count)] = 0
    """Texts with evidence that have several labels by that."""
    left_out: Annotated[
        tuple[tuple[Int63, Identity], ...],
        Field(max_length=MAX_LEFT_OUT, exclude_if=lambda records: not records),
    ] = ()
    """Positions and ids of the first rejected and repeated records, for those that have an id."""

    def as_dict(self) -> dict[str, Any]:
        """The counts for JSON, those by kind as objects."""
        return {
            name: dict(value) if isinstance(value, tuple) else value
            for name, value in self
            if name != "left_out"
        }


class RunAnnouncement(Message):
    """The producer's word on a run: that it begins (no totals yet), or that all of it is sent.

    `submission_id` tells one sending of the run from another: what is cancelled are sendings, so a
    cancelled run can be sent again. Older producers tell nothing of the last three.
    """

    run: Run
    submission_id: OwnId
    totals: Totals | None = None
    input: InputSummary | None = None
    proof_key: Annotated[ProofKey | None, _LEFT_OUT] = None
    """With it the proofs of this submission's claims are made. Workers do not have it."""
    digest: Annotated[DigestText | None, _LEFT_OUT] = None
    """The `ClaimsDigest` of all claims of the run, with the totals."""
    positions: Annotated[PositionsText | None, _LEFT_OUT] = None
    """The `Positions` of all claims of the run, with the totals."""
