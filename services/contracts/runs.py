"""The run: claims x prompt x context, its totals, and the summary of its input."""

from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from services.contracts.bounds import (
    MAX_COUNTED_KINDS,
    MAX_LEFT_OUT,
    GeneratedId,
    Identity,
    Int63,
    Name,
)
from services.contracts.contexts import ContextSpec
from services.contracts.prompts import PromptSpec
from services.contracts.proofs import DigestText, PositionsText, ProofKey
from services.contracts.values import Value, content_id
from services.contracts.wire import PROOFS_VERSION, REASONING_VERSION, Message

_LEFT_OUT = Field(exclude_if=lambda value: value is None)
Counts = Annotated[tuple[tuple[Name, Int63], ...], Field(max_length=MAX_COUNTED_KINDS)]
"""Kinds and their counts, the most frequent first."""


class Run(Value):
    """One file of claims with one prompt on one context.

    `run_id` depends on content only: the same lines, read in the same way, with the same prompt and
    context are the same run, wherever the file is and however often it is submitted. (A local
    model's directory is part of its context, because workers load it from there.) `source`, the
    file's name, is for display and not part of the identity.
    """

    source: Name
    source_digest: GeneratedId
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

    @property
    def message_version(self) -> int:
        """The lowest version whose readers handle messages about its claims correctly."""
        return PROOFS_VERSION if self.prompt.reasoning is None else REASONING_VERSION


class Totals(Value):
    """How many lines the producer read, and their results: `lines = claims + repeated + rejected`.

    A repeated line has the id and the content of an earlier one, which is the claim.
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
    """What the producer found in a file, as counts.

    `records` counts the whole file, before `--limit`. `gold` counts the claims by the prompt's
    labels. `unknown_labels` counts claims whose label is not in the prompt, by the file's spelling:
    they are verified, and excluded from the scores. `without_evidence` counts the reasons why
    claims have no evidence. With `numeric_ids` all ids are whole numbers, exported as numbers.
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
    """Claims without a label. -1 means that the label is withheld, see `kept_back`."""
    kept_back: Int63
    unknown_labels: Counts
    own_ids: Int63
    """Claims that got a new id, because another claim has their id with other evidence."""
    numeric_ids: bool
    evidence_partly_used: Annotated[Int63, Field(exclude_if=lambda count: not count)] = 0
    """Claims of whose evidence only a part was used."""
    same_content: Annotated[Int63, Field(exclude_if=lambda count: not count)] = 0
    """Claims with the text and evidence of an earlier claim that has another id."""
    other_label: Annotated[Int63, Field(exclude_if=lambda count: not count)] = 0
    """How many such pairs of text and evidence have more than one label."""
    left_out: Annotated[
        tuple[tuple[Int63, Identity], ...],
        Field(max_length=MAX_LEFT_OUT, exclude_if=lambda records: not records),
    ] = ()
    """Positions and ids of the first rejected and repeated records that have an id."""

    def as_dict(self) -> dict[str, Any]:
        """The counts for JSON; counts by kind become objects."""
        return {
            name: dict(value) if isinstance(value, tuple) else value
            for name, value in self
            if name != "left_out"
        }


class RunAnnouncement(Message):
    """The producer announces that a run begins (without totals), or that all of it is sent.

    `submission_id` identifies one submission of the run. Submissions are cancelled, not runs, so a
    cancelled run can be submitted again. Older producers do not send the last three fields.
    """

    run: Run
    submission_id: GeneratedId
    totals: Totals | None = None
    input: InputSummary | None = None
    proof_key: Annotated[ProofKey | None, _LEFT_OUT] = None
    """The key of the proofs of this submission's claims. Workers do not have it."""
    digest: Annotated[DigestText | None, _LEFT_OUT] = None
    """The `ClaimsDigest` of all claims of the run; sent with the totals."""
    positions: Annotated[PositionsText | None, _LEFT_OUT] = None
    """The `Positions` of all claims of the run; sent with the totals."""
