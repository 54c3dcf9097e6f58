"""The claims of a file. Each pass over the file gives the same claims."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from services.contracts import Claim, PromptSpec
from services.contracts.errors import InputError
from services.contracts.runs import InputSummary
from services.contracts.values import content_id
from services.producer.corpus import Corpus, read_corpus
from services.producer.dataset_formats import (
    FORMATS,
    PLAIN,
    SAMPLE_RECORDS,
    DatasetFormat,
    format_named,
    read_plain,
    recognized,
)
from services.producer.fields import NAMES, label_text, named_fields, normalized
from services.producer.input_counts import InputCounts
from services.producer.parse import NO_LABEL, ParsedClaim, Parser, Rejection, check_columns
from services.producer.seen import Duplicate, SeenIds
from services.producer.source import Record, Source, sample_records

_CHUNK_RECORDS = 1_024
# The flags by which parts of a file's identity are given.
_FLAGS = {
    "columns": "--column",
    "reading": "--format",
    "each_evidence": "--each-evidence",
    "corpus": "--corpus",
}
# So that memory stays constant: of more claims, records with their labels are rejected.
_MAX_LATE_LABELS = 100_000


@dataclass(frozen=True)
class Selection:
    """How a file is read, and which of its records are used.

    `format` names a data set's format, or `plain`; None: it is recognised. `limit` takes the first
    records, or with a `seed` a random sample. `only`: the ids of the claims to use. The other
    fields are as in `Parser`.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    label_map: Mapping[str, str] = field(default_factory=dict)
    each_evidence: bool = False
    corpus: Path | None = None
    limit: int | None = None
    seed: int | None = None
    only: frozenset[str] | None = None


class ClaimsFile:
    """The claims of one file for one prompt.

    `records` is the number of records in the file, `rows` their number before rows of one claim are
    merged, `records_to_read` the number within the selection's limit.
    """

    def __init__(
        self,
        source: Source,
        prompt: PromptSpec,
        selection: Selection = Selection(),
        *,
        on_records: Callable[[int], None] = lambda _: None,
        on_pages: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Read the whole file once. `on_records` is called with the number of records read so far,
        `on_pages` with the number of pages of a corpus.

        Raises InputError when the file is empty, a column is missing, or the corpus is not one.
        """
        check_columns(selection.columns)
        self.source = source
        self.selection = selection
        self.prompt = prompt
        self.name = source.name
        first = source.first_records(SAMPLE_RECORDS)
        if selection.format is None:
            self.format = recognized(first)
        else:
            self.format = format_named(selection.format)
            _check_format(source.name, self.format, first)
        if selection.each_evidence and self.format.pieces is None:
            raise InputError(
                f"{source.name}: --each-evidence does not apply to {self.format.title}, whose "
                "evidence belongs to the claim as a whole; leave it out, or name another --format"
            )
        if source.columns is not None:
            _check_header(source, selection.columns)
        if self.format.merged:
            source.same_claim = self._parser(None).same_claim
        file_summary = source.summarize(on_records)
        self.rows = file_summary.rows
        self.records = file_summary.records
        self.records_to_read = self.records
        if selection.limit is not None:
            self.records_to_read = min(selection.limit, self.records)
        self._late_labels: dict[str, tuple[str, str | None]] = {}
        """For claims whose first record has no label: that of a later record, as the file spells it
        and as the prompt does."""
        self._corpus: Corpus | None = None
        self.unused_labels: tuple[str, ...] = ()
        """After `inspect`: labels in `label_map` that no record has."""
        self.ignored_keys: tuple[str, ...] = ()
        """After `inspect`, for the plain format: columns or keys that are not a claim's field."""
        self.disagreements: Mapping[tuple[str, str], int] = {}
        """After `inspect`: as `Parser.disagreements`, with the names as the file spells them."""
        self.not_selected = 0
        """After `inspect`: records with no claim that is in `only`."""
        if selection.corpus is not None:
            self._corpus = self._read_corpus(selection.corpus, on_pages)
        self._identity = self._identity_of(file_summary.digest)
        self.source_digest = content_id("src", self._identity)

    def differing_flag(self, source_digest: str) -> str | None:
        """The flag by which alone this file differs from that of a digest: with another or no value
        the digest is the same. None if there is none such.
        """
        identity = self._identity
        for key, flag in _FLAGS.items():
            others = [{name: value for name, value in identity.items() if name != key}]
            if flag == "--column":
                others = [{**identity, key: {}}]
            elif flag == "--format":
                others += [{**identity, key: known.name} for known in FORMATS]
            if source_digest in (content_id("src", other) for other in others):
                return flag
        return None

    def inspect(
        self,
        on_rejected: Callable[[Rejection], None] = lambda _: None,
        on_records: Callable[[int], None] = lambda _: None,
    ) -> InputSummary:
        """Read every claim, and return the summary.

        Raises InputError when no record has a named column.
        """
        parser, counts = self._count(on_rejected, on_records)
        if self._late_labels:  # their claims are counted without them
            parser, counts = self._count(lambda _: None, on_records)
        for field_name, column in self.selection.columns.items():
            if column in parser.unseen_columns:
                listed = ", ".join(repr(key) for key in list(parser.keys_seen)[:20]) or "none"
                raise InputError(
                    f"{self.name}: no line has the key {column!r} for {field_name}; the keys are "
                    f"{listed}. Correct --column {field_name}={column}"
                )
        if self.format is PLAIN:
            known = {normalized(name) for names in NAMES.values() for name in names}
            known |= {normalized(column) for column in self.selection.columns.values()}
            self.ignored_keys = tuple(k for k in parser.keys_seen if normalized(k) not in known)
        self.unused_labels = tuple(
            label
            for label in self.selection.label_map
            if normalized(label_text(label) or "") in parser.labels_unused
        )
        spelled = {normalized(key): key for key in parser.keys_seen}
        self.disagreements = {
            (spelled[used], spelled[other]): count
            for (used, other), count in parser.disagreements.items()
        }
        self.not_selected = counts.not_selected
        return counts.summary()

    def _count(
        self, on_rejected: Callable[[Rejection], None], on_records: Callable[[int], None]
    ) -> tuple[Parser, InputCounts]:
        parser, counts = self._parser(self._corpus), self.new_counts()
        with closing(SeenIds()) as seen:
            for read, _ in self._chunks(parser, counts, on_rejected, seen):
                on_records(read)
            counts.same_content, counts.other_label = seen.same_contents()
        return parser, counts

    def claims(
        self, counts: InputCounts, on_rejected: Callable[[Rejection], None] = lambda _: None
    ) -> Iterator[tuple[int, list[Claim]]]:
        """The claims in chunks, without duplicates and contradictions, each with the number of
        records read so far. All records are counted in `counts`.
        """
        with closing(SeenIds()) as seen:
            yield from self._chunks(self._parser(self._corpus), counts, on_rejected, seen)

    def __iter__(self) -> Iterator[Claim]:
        """The claims one by one."""
        for _, claims in self.claims(self.new_counts()):
            yield from claims

    def new_counts(self) -> InputCounts:
        return InputCounts(self.format.title, self.source.container, self.records)

    def _chunks(
        self,
        parser: Parser,
        counts: InputCounts,
        on_rejected: Callable[[Rejection], None],
        seen: SeenIds,
    ) -> Iterator[tuple[int, list[Claim]]]:
        records = self._records_to_read()
        read = 0
        while chunk := list(islice(records, _CHUNK_RECORDS)):
            read += len(chunk)
            results = [(record, parser.parse(record)) for record in chunk]
            parsed = [p for _, found in results if not isinstance(found, Rejection) for p in found]
            labels = ["" if each.label == NO_LABEL else each.label for each in parsed]
            checked = iter(seen.check([each.claim for each in parsed], labels))
            fresh: list[ParsedClaim] = []
            for record, found in results:
                if isinstance(found, Rejection):
                    if self.selection.only is None:
                        counts.add_rejection(found.kind, record.position, parser.record_id(record))
                        on_rejected(found)
                    else:
                        counts.not_selected += 1
                    continue
                selected = False
                for each in found:
                    duplicate, claim, _ = known = next(checked)
                    if not self._is_wanted(claim):
                        continue
                    selected = True
                    if duplicate is Duplicate.LABELLED and self._take_label(claim, each.label):
                        duplicate = Duplicate.REPEATED
                    if duplicate is Duplicate.REPEATED:
                        counts.add_repeated(record.position, claim.claim_id)
                    elif duplicate not in (Duplicate.NEW, Duplicate.OTHER_EVIDENCE):
                        rejection = parser.contradiction(record, known)
                        counts.add_rejection(rejection.kind, record.position, claim.claim_id)
                        on_rejected(rejection)
                    else:
                        if duplicate is Duplicate.OTHER_EVIDENCE:
                            counts.add_own_id()
                            each = replace(each, claim=claim)
                        if claim.claim_id in self._late_labels:
                            label, gold = self._late_labels[claim.claim_id]
                            claim = claim.model_copy(update={"gold": gold})
                            each = replace(each, claim=claim, label=label)
                        fresh.append(each)
                counts.not_selected += not selected
            counts.add_claims(fresh)
            yield read, [each.claim for each in fresh]

    def _records_to_read(self) -> Iterator[Record]:
        limit, seed = self.selection.limit, self.selection.seed
        return sample_records(self.source.records(), self.records, limit, seed)

    def _take_label(self, claim: Claim, label: str) -> bool:
        """Keep the label for the next pass over the file. False when there are too many."""
        if len(self._late_labels) < _MAX_LATE_LABELS:
            self._late_labels.setdefault(claim.claim_id, (label, claim.gold))
        return claim.claim_id in self._late_labels

    def _is_wanted(self, claim: Claim) -> bool:
        return self.selection.only is None or claim.claim_id in self.selection.only

    def _parser(self, corpus: Corpus | None) -> Parser:
        return Parser(
            self.name,
            self.prompt,
            self.format,
            columns=self.selection.columns,
            label_map=self.selection.label_map,
            each_evidence=self.selection.each_evidence,
            corpus=corpus,
        )

    def _read_corpus(self, path: Path, on_pages: Callable[[int], None]) -> Corpus:
        if self.format.corpus is None:
            raise InputError(
                f"{self.name} is read as {self.format.title}, which uses no corpus; leave out "
                "--corpus, or name the format with --format"
            )
        parser = self._parser(None)
        references = (
            reference
            for record in self._records_to_read()
            for reference in parser.references(record)
        )
        return read_corpus(path, references, self.format.corpus, on_pages)

    def _identity_of(self, digest: str) -> dict[str, object]:
        """What determines the claims. Gold labels do not: naming or mapping the label column later
        does not change the run.
        """
        identity: dict[str, object] = {
            "bytes": digest,
            "format": self.source.container,
            "columns": {f: c for f, c in self.selection.columns.items() if f != "label"},
        }
        if self.format.read is not read_plain:
            identity["reading"] = self.format.name
        if self.selection.each_evidence:
            identity["each_evidence"] = True
        if self._corpus is not None:
            identity["corpus"] = self._corpus.digest
        if self.selection.only is not None:
            identity["only"] = sorted(self.selection.only)
        return identity


def _check_format(name: str, format: DatasetFormat, records: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError when the first records have none of the named format's own keys, or all
    have evidence that it does not have.
    """
    own = format.keys.difference(*NAMES.values())
    keys = list(dict.fromkeys(normalized(key) for record in records for key in record))
    what = None
    if own and records and own.isdisjoint(keys):
        what = (
            f"its first records have no {' and no '.join(map(repr, sorted(own)))}; their keys are "
            f"{', '.join(keys[:20])}"
        )
    elif not own:
        structured = [
            f for f in map(named_fields, records) if not isinstance(f.get("evidence"), str)
        ]
        if {format.test(fields) for fields in structured} == {False}:
            what = "the evidence of its first records has another form"
    if what is not None:
        raise InputError(
            f"{name}: it is not {format.title}: {what}. Leave out --format {format.name}, or name "
            "another"
        )


def _check_header(source: Source, columns: Mapping[str, str]) -> None:
    """Raises InputError when two columns have one name, or a named column is missing."""
    header = [column for column in source.columns or () if column]
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise InputError(
            f"{source.name}, line 1: two columns have the name {doubled!r}; rename one"
        )
    listed = ", ".join(repr(name) for name in header[:20]) or "none"
    for name, column in columns.items():
        if column not in header:
            raise InputError(
                f"{source.name}, line 1: there is no column {column!r} for {name}; the columns are "
                f"{listed}. Correct --column {name}={column}"
            )
