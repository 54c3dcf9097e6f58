"""The producer's work: a file's lines become batches on the broker, and totals that add up."""

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from services.broker import Outgoing, Publisher
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextSpec,
    PromptSpec,
    Run,
    RunAnnouncement,
    Totals,
    topology,
)
from services.contracts.bounds import MAX_BATCH_BYTES, MAX_NAME_CHARS
from services.contracts.errors import InputError
from services.contracts.values import content_id
from services.producer.metrics import LINES, PUBLISHED
from services.producer.ordering import together
from services.producer.parse import Parser, Rejection
from services.producer.rejected import RejectedFile
from services.producer.sample import chosen
from services.producer.seen import SeenIds, Sighting
from services.producer.source import Source, Survey

_CHUNK_LINES = 1_024
# In bytes: what a claim's field names and numbers add to its texts.
_CLAIM_OVERHEAD_BYTES = 100

Finished = Callable[[Sequence[Claim]], Collection[str]]
"""Which of these claims have an outcome already: their ids."""


@dataclass(frozen=True)
class Progress:
    """How far a submission is. `published` counts claims sent, or about to be."""

    lines: int
    published: int
    rejected: int


class Submission:
    """One file as one run: surveyed when made, published by `publish`.

    Publishing again publishes the same batches; a store that has some of their claims ignores
    them, and with `finished` they are not even sent.
    """

    def __init__(
        self,
        source: Source,
        survey: Survey,
        *,
        context: ContextSpec,
        prompt: PromptSpec,
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Raises InputError when the columns do not fit the file."""
        self._source = source
        self._survey = survey
        self._parser = Parser(source, prompt, columns)
        self.submission_id = secrets.token_hex(8)
        self.lines = survey.lines if limit is None else min(limit, survey.lines)
        self.run = Run(
            source=source.name[-MAX_NAME_CHARS:],
            source_digest=content_id(
                "src",
                {"bytes": survey.digest, "format": source.format, "columns": dict(columns or {})},
            ),
            context=context,
            prompt=prompt,
            limit=limit,
            seed=seed,
        )

    @property
    def ignored_columns(self) -> tuple[str, ...]:
        """Columns of a CSV file that are no field of a claim."""
        return self._parser.ignored_columns

    def publish(
        self,
        publisher: Publisher,
        rejections: RejectedFile,
        *,
        batch_size: int,
        order_by_evidence: bool = True,
        finished: Finished = lambda _: (),
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Totals:
        """Send every claim, wait until the broker has them all, and say how many there were.

        The run is announced before the first batch and again, with its totals, after the last.
        Raises InputError when not one line is a claim.
        """
        self._announce(publisher, None)
        counts, counted = _nothing_counted(), _nothing_counted()
        published = 0

        def waiting() -> Iterator[Claim]:
            nonlocal published
            for claims in self._distinct_claims(counts, rejections.write):
                _count_lines(counts, counted)
                done = finished(claims)
                for claim in claims:
                    if claim.claim_id not in done:
                        published += 1
                        yield claim
                on_progress(Progress(counts["lines"], published, counts["rejected"]))

        ordered = together(waiting()) if order_by_evidence else waiting()
        for number, claims in enumerate(_batches(ordered, batch_size)):
            batch = ClaimBatch(
                run=self.run,
                submission_id=self.submission_id,
                batch_id=f"{number:08d}-{claims[0].position}",
                claims=tuple(claims),
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
        totals = Totals(**counts)
        publisher.flush()
        self._announce(publisher, totals)
        if totals.claims == 0:
            raise InputError(
                f"{self._source.name}: none of its {totals.lines:,} lines is a claim; "
                f"{rejections.path} says why"
            )
        return totals

    def claims(self) -> Iterator[Sequence[Claim]]:
        """What would be sent, in pieces, without sending it."""
        yield from self._distinct_claims(_nothing_counted(), lambda _: None)

    def _distinct_claims(
        self, counts: dict[str, int], on_rejected: Callable[[Rejection], None]
    ) -> Iterator[list[Claim]]:
        """The claims in chunks, without the repeated and the contradicted; the rest is counted."""
        seen = SeenIds()
        lines = chosen(self._source.lines(), self._survey.lines, self.run.limit, self.run.seed)
        try:
            while chunk := list(islice(lines, _CHUNK_LINES)):
                counts["lines"] += len(chunk)
                parsed = [(line, self._parser.parse(line)) for line in chunk]
                claims: list[Claim] = []
                sightings = iter(seen.look([c for _, c in parsed if isinstance(c, Claim)]))
                for line, result in parsed:
                    if isinstance(result, Claim):
                        sighting = next(sightings)
                        if sighting is Sighting.NEW:
                            claims.append(result)
                            continue
                        if sighting is Sighting.REPEATED:
                            counts["repeated"] += 1
                            continue
                        result = self._parser.contradicted(line, result)
                    counts["rejected"] += 1
                    on_rejected(result)
                counts["claims"] += len(claims)
                yield claims
        finally:
            seen.close()

    def _announce(self, publisher: Publisher, totals: Totals | None) -> None:
        publisher.publish(
            Outgoing.of(
                RunAnnouncement(run=self.run, submission_id=self.submission_id, totals=totals),
                topology.RUNS_EXCHANGE,
                topology.RUNS_QUEUE,
                message_id=f"{self.run.run_id}/{'begun' if totals is None else 'sent'}",
            )
        )
        publisher.flush()


def _nothing_counted() -> dict[str, int]:
    return dict.fromkeys(("lines", "claims", "repeated", "rejected"), 0)


def _count_lines(counts: Mapping[str, int], counted: dict[str, int]) -> None:
    """Count what is new in `counts`, and note it in `counted`."""
    for name, became in (("claims", "claim"), ("repeated", "repeated"), ("rejected", "rejected")):
        LINES.labels(became).inc(counts[name] - counted[name])
    counted.update(counts)


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
