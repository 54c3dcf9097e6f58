"""Publishes a file of claims as one run: batches of claims, and the totals at the end."""

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
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
from services.contracts.bounds import MAX_NAME_CHARS
from services.contracts.claims import split_claims
from services.contracts.errors import InputError
from services.contracts.proofs import ClaimsDigest, Positions, new_key
from services.contracts.runs import InputSummary
from services.producer.claims_file import ClaimsFile
from services.producer.input_counts import InputCounts
from services.producer.metrics import LINES, PUBLISHED
from services.producer.ordering import group_by_evidence
from services.producer.rejected import RejectedFile

Finished = Callable[[Sequence[Claim]], Collection[str]]
"""Returns the ids of those claims that have an outcome."""


@dataclass(frozen=True)
class Progress:
    """The progress of a submission. `records` counts the records read, `published` the claims sent
    or about to be sent.
    """

    records: int
    published: int
    rejected: int


class Submission:
    """One file as one run, published by `publish`.

    Publishing it again sends the same claims. A store ignores those that have an outcome, and
    `finished` excludes them from sending.
    """

    def __init__(self, file: ClaimsFile, context: ContextSpec) -> None:
        self.file = file
        self.input: InputSummary | None = None
        """The summary, after `inspect`."""
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

    def inspect(
        self, rejections: RejectedFile, on_records: Callable[[int], None] = lambda _: None
    ) -> InputSummary:
        """Read every claim, write the rejected records, and return the summary.

        Raises InputError when no line is a claim or selected, or no line has a named column.
        """
        summary = self.file.inspect(rejections.write, on_records)
        if summary.claims == 0 and self.file.not_selected:
            raise InputError(
                f"{self.file.name}: none of the claims that --only selects from the run of --from "
                "is in this file; name the file of that run, with the same --format, --column and "
                "--limit"
            )
        if summary.claims == 0:
            raise InputError(
                f"{self.file.name}: none of its {self.file.records_to_read:,} lines is a claim; "
                f"{rejections.path} has the reasons"
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
        """Send every claim, wait until the broker has confirmed all, and return the totals.

        The run is announced before the first batch and again, with its totals, after the last.
        """
        self._announce(publisher, None)
        counts = self.file.new_counts()
        counted: Counter[str] = Counter()
        published = 0
        digest, positions = ClaimsDigest(), Positions()
        key = bytes.fromhex(self._proof_key)

        def unfinished() -> Iterator[Claim]:
            nonlocal published, digest
            for read, claims in self.file.claims(counts):
                _count_lines(counts, counted)
                digest = digest.plus(ClaimsDigest.of((c.claim_id, c.position) for c in claims))
                positions.add(claim.position for claim in claims)
                done = finished(claims)
                for claim in claims:
                    if claim.claim_id not in done:
                        published += 1
                        yield claim
                on_progress(Progress(read, published, counts.rejected))

        ordered = group_by_evidence(unfinished()) if order_by_evidence else unfinished()
        for number, claims in enumerate(split_claims(ordered, batch_size)):
            batch = ClaimBatch.with_proofs(
                self.run, self.submission_id, f"{number:08d}-{claims[0].position}", claims, key
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
            lines=counts.claims + counts.repeated + counts.rejected,
            claims=counts.claims,
            repeated=counts.repeated,
            rejected=counts.rejected,
        )
        publisher.flush()
        self._announce(publisher, totals, str(digest), positions.as_text())
        return totals

    def claims(self) -> Iterator[Sequence[Claim]]:
        """All claims of the file, in chunks, without sending them."""
        for _, claims in self.file.claims(self.file.new_counts()):
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
                    schema_version=self.run.message_version,
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


def _count_lines(counts: InputCounts, counted: Counter[str]) -> None:
    """Add the increase since the last call to the metric; `counted` has the counts so far."""
    now = {"claim": counts.claims, "repeated": counts.repeated, "rejected": counts.rejected}
    for result, count in now.items():
        LINES.labels(result).inc(count - counted[result])
    counted.update({result: count - counted[result] for result, count in now.items()})
