"""The formats of data sets, as they are published: how each is recognised and read.

docs/formats.md has the table for people: what is taken as the claim, its evidence and its label.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from services.producer.fields import (
    NAMES,
    WithoutEvidence,
    evidence_text,
    first_of,
    id_text,
    is_missing,
    is_name,
    named_fields,
    structured,
)

SAMPLE_RECORDS = 20
"""The number of first records by which a file is recognised."""

Fields = Mapping[str, Any]
Reference = tuple[str, int | None]
"""A page or document, and the number of a sentence; None: all sentences."""


class RawClaim(NamedTuple):
    """The values of a record, before they are checked.

    `evidence` is text, or None for the reason `without`; `partly`: some of its text was not used.
    `references` are looked up in a corpus, where one is given, and replace it.
    """

    id: Any
    claim: Any
    label: Any
    evidence: Any = None
    without: WithoutEvidence | None = None
    references: tuple[Reference, ...] = ()
    partly: bool = False


@dataclass(frozen=True)
class DatasetFormat:
    """The format of a data set's records. A record matches when it has all of `keys` (normalized)
    and `test` is true; `test` is None for a record that may be of this format or of another.

    `labels` maps spellings to the default prompt's labels, for prompts that do not have them;
    `classes` are the names of labels that are numbers. `pieces` makes one claim of each piece of a
    record's evidence. `corpus` says what `--corpus` must name for its references.
    """

    name: str
    title: str
    keys: frozenset[str]
    read: Callable[[Fields], RawClaim]
    test: Callable[[Fields], bool | None] = lambda _: True
    labels: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] = ()
    pieces: Callable[[Fields], Iterator[RawClaim]] | None = None
    merged: bool = False
    """Adjacent records of one claim are merged into one, with all of them as its `rows`."""
    corpus: str | None = None

    def matches(self, records: Sequence[Fields]) -> bool:
        """Whether all these records can be of it, and one is."""
        results = [self.keys <= fields.keys() and self.test(fields) for fields in records]
        return False not in results and True in results


def read_plain(fields: Fields) -> RawClaim:
    """Read a record by the usual names of fields. Of several with evidence, the first text is used;
    a single word is one only where there is no other.
    """
    evidence: Any = None
    partly = False
    why: WithoutEvidence | None = WithoutEvidence.NONE
    for name in NAMES["evidence"]:
        value = fields.get(name)
        if value is None or is_missing(value):
            continue
        if isinstance(value, int | float):
            evidence = value if evidence is None else evidence  # to be rejected
            continue
        text, reason, part = evidence_text(value)
        if text is None:
            why = reason if why is WithoutEvidence.NONE else why
        elif not isinstance(evidence, str) or (is_name(evidence) and not is_name(text)):
            evidence, partly = text, part
        else:
            partly = partly or not (is_name(text) or text in evidence)
    if evidence is not None:
        why = None
    return RawClaim(_id(fields), _claim(fields), _label(fields), evidence, why, partly=partly)


def _id(fields: Fields) -> Any:
    return first_of(fields, NAMES["id"])


def _claim(fields: Fields) -> Any:
    return first_of(fields, NAMES["claim"])


def _label(fields: Fields) -> Any:
    return first_of(fields, NAMES["label"])


def _plain_pieces(fields: Fields) -> Iterator[RawClaim]:
    """One claim for each piece in a list of evidence, with the piece's label if it has one."""
    raw = read_plain(fields)
    pieces = structured(first_of(fields, NAMES["evidence"]))
    if isinstance(pieces, Mapping):  # of lists, as Hugging Face keeps a list of objects
        columns = [part for part in pieces.values() if isinstance(part, list)]
        if len(columns) == len(pieces) and len(set(map(len, columns))) == 1:
            pieces = [dict(zip(pieces, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(pieces, list) or len(pieces) < 2:
        yield raw
        return
    for number, piece in enumerate(pieces, 1):
        label = raw.label
        if isinstance(piece, Mapping):
            label = next((piece[k] for k in ("evidence_label", "label") if k in piece), label)
        text, why, partly = evidence_text(piece)
        identity = id_text(raw.id)
        yield raw._replace(
            id=f"{identity}#{number}" if isinstance(identity, str) else None,
            label=label,
            evidence=text,
            without=why,
            partly=partly,
        )


def _or_plain_text(fields: Fields, raw: RawClaim) -> RawClaim:
    """For a record whose evidence is text, where its format has none: the text."""
    plain = read_plain(fields)
    return raw if plain.evidence is None else plain


def _looked_up(
    fields: Fields, references: Iterable[Reference], rows: Sequence[Fields] | None = None
) -> RawClaim:
    """Evidence that a corpus has; without one the text in the record, or in the `rows` of it."""
    distinct = tuple(dict.fromkeys(references))
    own = [read_plain(_without_references(row) if distinct else row) for row in rows or [fields]]
    text = own[0].evidence
    if len(own) > 1:
        text = " ".join(dict.fromkeys(str(raw.evidence) for raw in own if raw.evidence))
    why = WithoutEvidence.REFERENCES if distinct else WithoutEvidence.NONE
    return RawClaim(
        id=_id(fields),
        claim=_claim(fields),
        label=_label(fields),
        evidence=text or None,
        without=None if text else why,
        references=distinct,
        partly=any(raw.partly for raw in own),
    )


def _without_references(row: Fields) -> Fields:
    return {
        name: value
        for name, value in row.items()
        if name != "evidence_sentences" and (name != "evidence" or isinstance(value, str))
    }


def _fever_tuples(value: Any) -> Iterator[Sequence[Any]]:
    """FEVER's `[annotation, evidence, page, sentence]`, at any depth."""
    if isinstance(value, list | tuple):
        if len(value) == 4 and not any(isinstance(part, list | tuple) for part in value):
            yield value
        else:
            for part in value:
                yield from _fever_tuples(part)


def _is_fever(fields: Fields) -> bool | None:
    tuples = list(_fever_tuples(fields.get("evidence")))
    if not tuples:  # NOT ENOUGH INFO, or of another format
        why = evidence_text(fields.get("evidence")).without
        return None if why in (WithoutEvidence.NONE, WithoutEvidence.NO_TEXT) else False
    return all(
        isinstance(page, str | None)
        and all(_is_number_or_none(part) for part in (annotation, evidence_id, number))
        for annotation, evidence_id, page, number in tuples
    )


def _is_number_or_none(value: Any) -> bool:
    return isinstance(value, int | None) or (isinstance(value, str) and value.isdecimal())


def _read_fever(fields: Fields) -> RawClaim:
    return _looked_up(
        fields,
        (
            (page, int(number) if isinstance(number, str) else number)
            for _, _, page, number in _fever_tuples(fields.get("evidence"))
            if isinstance(page, str)
        ),
    )


def _rows(fields: Fields) -> list[dict[str, Any]]:
    return [named_fields(row) for row in fields.get("rows") or [fields]]


def _read_fever_rows(fields: Fields) -> RawClaim:
    """One row for each evidence; rows of one claim were merged into lists of values."""

    def references() -> Iterator[Reference]:
        for row in _rows(fields):
            page, number = row.get("evidence_wiki_url"), row.get("evidence_sentence_id")
            if isinstance(page, str) and page:
                text = str(number)
                yield page, int(text) if text.isdecimal() else None

    return _looked_up(fields, references(), _rows(fields))


def _read_scifact(fields: Fields, rows: Sequence[Fields] | None = None) -> RawClaim:
    evidence = fields.get("evidence") or {}
    labels = set()
    references: list[Reference] = []
    for document, rationales in evidence.items():
        for rationale in rationales:
            labels.add(rationale.get("label"))
            references += ((str(document), number) for number in rationale.get("sentences", ()))
    if not references:  # what was cited does not decide the claim
        references = [(str(document), None) for document in fields.get("cited_doc_ids") or ()]
    raw = _looked_up(fields, references, rows)
    if "evidence" not in fields:
        return raw  # the test split
    label = "NOT ENOUGH INFO" if not labels else labels.pop() if len(labels) == 1 else "MIXED"
    return raw._replace(label=label)


def _read_scifact_rows(fields: Fields) -> RawClaim:
    evidence: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(fields):
        if document := str(row.get("evidence_doc_id") or ""):
            evidence.setdefault(document, []).append(
                {"label": row.get("evidence_label"), "sentences": row.get("evidence_sentences")}
            )
    return _read_scifact({**fields, "evidence": evidence}, _rows(fields))


def _read_averitec(fields: Fields) -> RawClaim:
    pairs = []
    for question in fields.get("questions") or ():
        answers = question.get("answers") or () if isinstance(question, Mapping) else ()
        for answer in answers if isinstance(answers, list) else (answers,):
            if isinstance(answer, Mapping) and answer.get("answer"):
                said = str(answer["answer"])
                because = answer.get("boolean_explanation")
                pairs.append(
                    f"{question.get('question') or ''} {said}{f'. {because}' if because else ''}"
                )
    text = " ".join(pair.strip() for pair in pairs)
    why = None if text else WithoutEvidence.NONE
    raw = RawClaim(_id(fields), _claim(fields), _label(fields), text or None, why)
    return raw if text else _or_plain_text(fields, raw)


def _read_hover(fields: Fields) -> RawClaim:
    facts = fields.get("supporting_facts") or ()

    def references() -> Iterator[Reference]:
        for fact in facts:
            page, number = (
                (fact.get("key"), fact.get("value")) if isinstance(fact, Mapping) else fact[:2]
            )
            yield str(page), number

    return _looked_up(fields, references())


def _read_feverous(fields: Fields) -> RawClaim:
    def references() -> Iterator[Reference]:
        pieces = fields.get("evidence")
        for piece in pieces if isinstance(pieces, list) else ():
            for content in piece.get("content") or ():
                page, _, rest = str(content).partition("_sentence_")
                yield page, int(rest) if rest.isdecimal() else None

    return _looked_up(fields, references())


def _is_feverous(fields: Fields) -> bool | None:
    """By objects with names of sentences and cells, and what belongs to them."""
    pieces = fields.get("evidence")
    if is_missing(pieces):
        return True if "annotator_operations" in fields else None
    return isinstance(pieces, list) and all(
        isinstance(piece, Mapping) and "context" in piece and isinstance(piece.get("content"), list)
        for piece in pieces
    )


def _from(name: str) -> Callable[[Fields], RawClaim]:
    """The evidence from one field, the rest by the usual names."""

    def read(fields: Fields) -> RawClaim:
        text, why, partly = evidence_text(fields.get(name))
        raw = RawClaim(_id(fields), _claim(fields), _label(fields), text, why, partly=partly)
        return raw if text else _or_plain_text(fields, raw)

    return read


def _read_liar(fields: Fields) -> RawClaim:
    return RawClaim(_id(fields), _claim(fields), _label(fields), None, WithoutEvidence.NONE)


def _keys(*names: str) -> frozenset[str]:
    return frozenset(names)


_TRUTH = {"true": "SUPPORTS", "false": "REFUTES"}
_LIAR_LABELS = ("pants-fire", "false", "barely-true", "half-true", "mostly-true", "true")
_FEVER_CORPUS = "the directory with FEVER's Wikipedia dump (wiki-pages/*.jsonl)"
_SCIFACT_CORPUS = "SciFact's corpus.jsonl"

FORMATS: tuple[DatasetFormat, ...] = (
    DatasetFormat(
        "fever-rows",
        "FEVER, one row an evidence (Hugging Face)",
        _keys("claim", "evidence_wiki_url", "evidence_sentence_id"),
        _read_fever_rows,
        merged=True,
        corpus=_FEVER_CORPUS,
    ),
    DatasetFormat(
        "fever",
        "FEVER",
        _keys("id", "claim"),
        _read_fever,
        test=_is_fever,
        corpus=_FEVER_CORPUS,
    ),
    DatasetFormat(
        "vitaminc",
        "VitaminC",
        _keys("unique_id", "claim", "evidence", "revision_type"),
        read_plain,
    ),
    DatasetFormat(
        "climate-fever",
        "Climate-FEVER",
        _keys("claim_id", "claim", "claim_label", "evidences"),
        read_plain,
        classes=("SUPPORTS", "REFUTES", "NOT_ENOUGH_INFO", "DISPUTED"),
        pieces=_plain_pieces,
    ),
    DatasetFormat(
        "scifact-rows",
        "SciFact, one row a document (Hugging Face)",
        _keys("claim", "evidence_doc_id", "evidence_sentences"),
        _read_scifact_rows,
        merged=True,
        corpus=_SCIFACT_CORPUS,
    ),
    DatasetFormat(
        "scifact",
        "SciFact",
        _keys("id", "claim", "cited_doc_ids"),
        _read_scifact,
        test=lambda fields: isinstance(fields.get("evidence", {}), Mapping),
        corpus=_SCIFACT_CORPUS,
    ),
    DatasetFormat(
        "averitec",
        "AVeriTeC",
        _keys("claim", "questions"),
        _read_averitec,
        test=lambda fields: isinstance(fields.get("questions"), list),
    ),
    DatasetFormat(
        "hover",
        "HoVer",
        _keys("uid", "claim", "supporting_facts"),
        _read_hover,
        classes=("NOT_SUPPORTED", "SUPPORTED"),
    ),
    DatasetFormat(
        "feverous",
        "FEVEROUS",
        _keys("id", "claim"),
        _read_feverous,
        test=_is_feverous,
    ),
    DatasetFormat(
        "llm-aggrefact",
        "LLM-AggreFact",
        _keys("dataset", "doc", "claim", "label"),
        _from("doc"),
        labels={"1": "SUPPORTS"},
    ),
    DatasetFormat(
        "pubhealth",
        "PUBHEALTH",
        _keys("claim_id", "claim", "explanation", "main_text"),
        _from("main_text"),
        labels={**_TRUTH, "unproven": "NOT ENOUGH INFO"},
        classes=("false", "mixture", "true", "unproven"),
    ),
    DatasetFormat(
        "liar-plus",
        "LIAR-PLUS",
        _keys("label", "justification"),
        _from("justification"),
        test=lambda fields: "json_file_id" in fields or str(fields.get("id", "")).endswith(".json"),
        labels={**_TRUTH, "pants-fire": "REFUTES"},
    ),
    DatasetFormat(
        "liar",
        "LIAR",
        _keys("label", "statement", "speaker"),
        _read_liar,
        labels={**_TRUTH, "pants-fire": "REFUTES"},
        classes=("false", "half-true", "mostly-true", "true", "barely-true", "pants-fire"),
    ),
    DatasetFormat(
        "fever-symmetric",
        "FEVER Symmetric",
        _keys("id", "claim"),
        read_plain,
        test=lambda fields: (
            "evidence_sentence" in fields or {"sentence1", "sentence2", "evid"} <= fields.keys()
        ),
    ),
)

PLAIN = DatasetFormat("plain", "claims", frozenset(), read_plain, pieces=_plain_pieces)
"""Any other file: fields are found by their names."""


def format_named(name: str) -> DatasetFormat:
    """Raises KeyError when no format has this name."""
    return {known.name: known for known in (*FORMATS, PLAIN)}[name]


def recognized(records: Sequence[Fields]) -> DatasetFormat:
    """The format of a file by its first records; PLAIN when no format matches."""
    looked_at = [named_fields(record) for record in records[:SAMPLE_RECORDS]]
    return next((known for known in FORMATS if known.matches(looked_at)), PLAIN)


_LIAR_COLUMNS = (
    *("id", "label", "statement", "subject", "speaker", "job", "state", "party"),
    *("barely_true", "false", "half_true", "mostly_true", "pants_on_fire", "context"),
)


def columns_without_header(fields: Sequence[str]) -> Sequence[str] | None:
    """The columns of a data set's file without a header, by its first record."""
    if len(fields) == len(_LIAR_COLUMNS) and fields[1] in _LIAR_LABELS:
        return _LIAR_COLUMNS
    if len(fields) == len(_LIAR_COLUMNS) + 2 and fields[2] in _LIAR_LABELS:
        return ("number", *_LIAR_COLUMNS, "justification")
    return None
