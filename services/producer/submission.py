"""The producer's work: a file's lines become batches on the broker, and totals that add up."""

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.broker import Outgoing, Publisher
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextSpec,
    Run,
    RunAnnouncement,
    Totals,
    topology,
)
from services.contracts.bounds import MAX_BATCH_BYTES, MAX_NAME_CHARS
from services.contracts.errors import InputError
from services.contracts.proofs import ClaimsDigest, Positions, new_key
from services.contracts.runs import InputSummary
from services.contracts.wire import PROVEN
from services.producer.claims_file import ClaimsFile
from services.producer.metrics import LINES, PUBLISHED
from services.producer.ordering import together
from services.producer.rejected import RejectedFile
from services.producer.summary import FileSummary

# In bytes: what a claim's field names, numbers and proof add to its texts.
_CLAIM_OVERHEAD_BYTES = 130

Finished = Callable[[Sequence[Claim]], Collection[str]]
"""Which of these claims have an outcome already: their ids."""


@dataclass(frozen=True)
class Progress:
    """How far a submission is. `published` counts claims sent, or about to be."""

    lines: int
    published: int
    rejected: int


class Submission:
    """One file as one run, published by `publish`.

    Publishing again publishes the same batches; a store that has some of their claims ignores
    them, and with `finished` they are not even sent.
    """

    def __init__(self, file: ClaimsFile, context: ContextSpec) -> None:
        self.file = file
        self.input: InputSummary | None = None
        """What `inspect` found."""
        self.submission_id = secrets.token_hex(8)
        self._proof_key = new_key()
        self.run = Run(
            source=file.name[-MAX_NAME_CHARS:],
            source_digest=file.source_digest,
            context=context,
            prompt=file.prompt,
            limit=file.selection.limit,
            seed=file.selection.seed,
        )

    @property
    def lines(self) -> int:
        """How many records are read."""
        return self.file.lines

    def inspect(
        self, rejections: RejectedFile, on_lines: Callable[[int], None] = lambda _: None
    ) -> InputSummary:
        """Read every claim, write down what is none, and say what there is.

        Raises InputError when not one line is a claim, or a named column is in none.
        """
        summary = self.file.inspect(rejections.write, on_lines)
        if summary.claims == 0:
            raise InputError(
                f"{self.file.name}: none of its {self.lines:,} lines is a claim; "
                f"{rejections.path} says why"
            )
        self.input = summary
        return summary

    def publish(
        self,
        publisher: Publisher,
        *,
        batch_size: int,
        order_by_evidence: bool = True,
        finished: Finished = lambda _: (),
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Totals:
        """Send every claim, wait until the broker has them all, and say how many there were.

        The run is announced before the first batch and again, with its totals, after the last.
        """
        self._announce(publisher, None)
        summary = self.file.new_summary()
        counted: Counter[str] = Counter()
        published = 0
        digest, positions = ClaimsDigest(), Positions()
        key = bytes.fromhex(self._proof_key)

        def waiting() -> Iterator[Claim]:
            nonlocal published, digest
            for lines, claims in self.file.claims(summary):
                _count_lines(summary, counted)
                digest = digest.plus(ClaimsDigest.of((c.claim_id, c.position) for c in claims))
                positions.add(claim.position for claim in claims)
                done = finished(claims)
                for claim in claims:
                    if claim.claim_id not in done:
                        published += 1
                        yield claim
                on_progress(Progress(lines, published, summary.rejected))

        ordered = together(waiting()) if order_by_evidence else waiting()
        for number, claims in enumerate(_batches(ordered, batch_size)):
            batch = ClaimBatch(
                schema_version=PROVEN,
                run=self.run,
                submission_id=self.submission_id,
                batch_id=f"{number:08d}-{claims[0].position}",
                claims=tuple(claims),
                proofs=tuple(claim.proof(key) for claim in claims),
            )
            publisher.publish(
                Outgoing.of(
                    batch,
                    topology.CLAIMS_EXCHANGE,
                    topology.claims_queue(self.run.context.context_id),
                    message_id=f"{self.run.run_id}/{batch.batch_id}",
                )
            )
            PUBLISHED.inc(len(claims))
        totals = Totals(
            lines=summary.claims + summary.repeated + summary.rejected,
            claims=summary.claims,
            repeated=summary.repeated,
            rejected=summary.rejected,
        )
        publisher.flush()
        self._announce(publisher, totals, str(digest), positions.as_text())
        return totals

    def claims(self) -> Iterator[Sequence[Claim]]:
        """What would be sent, in pieces, without sending it."""
        for _, claims in self.file.claims(self.file.new_summary()):
            yield claims

    def _announce(
        self,
        publisher: Publisher,
        totals: Totals | None,
        digest: str | None = None,
        positions: str | None = None,
    ) -> None:
        publisher.publish(
            Outgoing.of(
                RunAnnouncement(
                    schema_version=PROVEN,
                    run=self.run,
                    submission_id=self.submission_id,
                    totals=totals,
                    input=self.input,
                    proof_key=self._proof_key,
                    digest=digest,
                    positions=positions,
                ),
                topology.RUNS_EXCHANGE,
                topology.RUNS_QUEUE,
                message_id=f"{self.run.run_id}/{'begun' if totals is None else 'sent'}",
            )
        )
        publisher.flush()


def _count_lines(summary: FileSummary, counted: Counter[str]) -> None:
    """Count what is new in `summary`, and note it in `counted`."""
    now = {"claim": summary.claims, "repeated": summary.repeated, "rejected": summary.rejected}
    for became, count in now.items():
        LINES.labels(became).inc(count - counted[became])
    counted.update({became: count - counted[became] for became, count in now.items()})


def _batches(claims: Iterable[Claim], batch_size: int) -> Iterator[list[Claim]]:
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
