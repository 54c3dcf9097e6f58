"""Parses a record into claims, or into a rejection with a reason and a next step."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from services.contracts import Claim, PromptSpec
from services.contracts.errors import InputError
from services.producer.corpus import Corpus
from services.producer.dataset_formats import PLAIN, DatasetFormat, RawClaim, read_plain
from services.producer.delimited import REPEATED_HEADER
from services.producer.fields import (
    CLAIM_NAMES,
    NAMES,
    WithoutEvidence,
    evidence_text,
    first_of,
    id_text,
    is_missing,
    label_text,
    named_fields,
    normalized,
)
from services.producer.seen import Duplicate, Seen
from services.producer.source import Record, as_object

_SHOWN_CHARS = 500
_SHOWN_LABEL_CHARS = 80
NO_LABEL = "-1"
"""What data sets write for a label that they withhold."""
# The JSON parser sees one record and counts its lines from one.
_WHERE_IN_LINE = re.compile(r"at line 1 column")

# The names of a Claim's fields in files.
_FIELDS = {"claim_id": "id", "text": "claim", "evidence": "evidence", "gold": "label"}

# Not the id: a record's and its claim's may differ. Unused evidence is counted where it is read.
_COMPARED = ("claim", "label")

_NEXT_STEPS = {
    "string_type": "write it as text: in JSON in quotes, in a table as a column of text",
    "string_too_long": "shorten it, or split the claim",
    "string_too_short": "give it some text, or leave the line out",
    "string_pattern_mismatch": "remove NUL characters, and give it more than white space",
    "string_unicode": "save the file as UTF-8, or name its encoding with --encoding",
}
_WRITE_JSON = "write one JSON object per line, in UTF-8"
_WRITE_OBJECT = 'write an object, like {"claim": "…", "evidence": "…", "label": "…"}'


class Rejection(BaseModel):
    """A line that is not a claim, as a row of `rejected.jsonl`. `kind` is a short reason."""

    model_config = ConfigDict(frozen=True)

    source: str
    line: int
    field: str | None
    kind: str
    reason: str
    next_step: str
    content: str
    """The line itself, cut at 500 characters."""


@dataclass(frozen=True, slots=True)
class ParsedClaim:
    """A claim with what `Claim` does not hold of its record.

    `label` is the label as the file spells it, "" for none; `claim.gold` is None when the prompt
    does not have the label. `without_evidence` is the reason why there is no evidence; `partly`:
    only a part of the evidence was used.
    """

    claim: Claim
    label: str
    without_evidence: WithoutEvidence | None
    partly: bool = False


class Parser:
    """Turns the records of one file into claims for one prompt.

    `columns` renames columns: a field (`id`, `claim`, `evidence`, `label`) to the file's.
    `label_map` maps a label in the file to a label of the prompt. With `each_evidence` a
    record becomes a claim for each piece of its evidence. References to pages are looked up in
    `corpus`.
    """

    def __init__(
        self,
        source_name: str,
        prompt: PromptSpec,
        format: DatasetFormat = PLAIN,
        *,
        columns: Mapping[str, str] | None = None,
        label_map: Mapping[str, str] | None = None,
        each_evidence: bool = False,
        corpus: Corpus | None = None,
    ) -> None:
        self._source_name = source_name
        self._prompt = prompt
        self._format = format
        self._columns = dict(columns or {})
        self._label_map = {
            normalized(label_text(label) or ""): name for label, name in (label_map or {}).items()
        }
        self._golds: dict[str, str | None] = {}
        self._each_evidence = each_evidence
        self._corpus = corpus
        self.labels_unused = set(self._label_map)
        """Labels in `label_map` that no record had so far."""
        self.unseen_columns = set(self._columns.values())
        """Columns that were named and that no record had so far."""
        self.keys_seen: dict[str, None] = {}
        """Names of columns or keys in order of appearance; a bounded number."""
        self._rivals: tuple[tuple[str, ...], ...] = ()
        self.disagreements: Counter[tuple[str, str]] = Counter()
        """In the plain format, where a record has two names of a field: the one that is used and
        the other one, with the number of records in which their values differ."""

    def parse(self, record: Record) -> Sequence[ParsedClaim] | Rejection:
        """The claims of this record, or a rejection."""
        if record.fault is not None:
            kind = "repeated header" if record.fault == REPEATED_HEADER else "unreadable line"
            return self._reject(
                record, None, kind, record.fault, "correct the line, or leave it out"
            )
        content = record.content
        fields: Any = content
        if isinstance(content, bytes):
            try:
                fields = from_json(content)
            except ValueError as error:
                return self._not_json(record, error)
            if not isinstance(fields, dict):
                reason = "Input should be an object"
                return self._reject(record, None, "not an object", reason, _WRITE_OBJECT)
            key = _repeated_key(content, fields)
            if key is not None:
                reason = f"the key {key[:_SHOWN_LABEL_CHARS]!r} is there twice, with two values"
                return self._reject(record, None, "repeated key", reason, "keep one of them")
        self._note_keys(fields)
        try:
            raw_claims = self._raw_claims(fields)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # A value that is not the list or object that the format has there.
            return self._reject(
                record,
                None,
                "not of its format",
                f"not a record of {self._format.title}: {error}",
                "correct it, or read the file with --format plain",
            )
        parsed = []
        for raw in raw_claims:
            try:
                parsed.append(self._parsed(record, raw))
            except ValidationError as error:
                return self._invalid(record, error, raw, fields)
        return parsed

    def references(self, record: Record) -> Sequence[tuple[str, int | None]]:
        """The pages and sentences that this record refers to."""
        try:
            fields = (
                from_json(record.content) if isinstance(record.content, bytes) else record.content
            )
            return [r for raw in self._raw_claims(fields) for r in raw.references]
        except (AttributeError, LookupError, TypeError, ValueError):
            return ()

    def contradiction(self, record: Record, seen: Seen) -> Rejection:
        """The rejection of a claim whose id an earlier record has with another text or label."""
        earlier = f"record {seen.earlier + 1:,} of the file"
        if seen.duplicate in (Duplicate.OTHER_LABEL, Duplicate.LABELLED):
            field = "label"
            other = "another" if seen.duplicate is Duplicate.OTHER_LABEL else "no"
            reason = f"{earlier} has the same claim and evidence with {other} label"
            step = "keep the record with the right label"
        else:
            field = "id"
            reason = f"{earlier} has the id {seen.claim.claim_id[:80]!r} for another claim"
            step = "give it another id, or none"
        return self._reject(record, field, "contradicts an earlier line", reason, step)

    def record_id(self, record: Record) -> object:
        """The id of a rejected record; None when it has none or cannot be read."""
        fields = as_object(record.content)
        return None if fields is None else id_text(first_of(self._named(fields), NAMES["id"]))

    def same_claim(self, fields: Mapping[str, Any]) -> object:
        """The id and the claim of a record, which identify it; None without a claim."""
        named = self._named(fields)
        claim = first_of(named, NAMES["claim"])
        return None if claim is None else (id_text(first_of(named, NAMES["id"])), claim)

    def _named(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The record's values; named columns replace the fields that they stand for."""
        named = named_fields(fields)
        for field, name in self._columns.items():
            for name_of_field in NAMES[field]:
                named.pop(name_of_field, None)
            if name in fields and (field != "evidence" or self._format.read is read_plain):
                named[NAMES[field][0]] = fields[name]
        return named

    def _raw_claims(self, fields: Mapping[str, Any]) -> Sequence[RawClaim]:
        named = self._named(fields)
        if self._each_evidence and self._format.pieces is not None:
            raw_claims = list(self._format.pieces(named))
        else:
            raw_claims = [self._format.read(named)]
        for names in self._rivals:
            present = [name for name in names if not is_missing(named.get(name))]
            self.disagreements.update(
                (present[0], other) for other in present[1:] if named[other] != named[present[0]]
            )
        if "evidence" in self._columns and self._format.read is not read_plain:
            value = fields.get(self._columns["evidence"])
            text, why, partly = (value, None, False) if _is_scalar(value) else evidence_text(value)
            raw_claims = [
                raw._replace(evidence=text, without=why, partly=partly, references=())
                for raw in raw_claims
            ]
        return raw_claims

    def _parsed(self, record: Record, raw: RawClaim) -> ParsedClaim:
        evidence, without, partly = raw.evidence, raw.without, raw.partly
        if self._corpus is not None and raw.references:
            text, missing = self._corpus.text(raw.references)
            if text is not None:
                partly = missing or (isinstance(evidence, str) and evidence not in text)
                evidence, without = text, None
            elif evidence is None:
                without = WithoutEvidence.NOT_FOUND
        label, gold = self._gold(raw.label)
        claim_id = id_text(raw.id)
        text = raw.claim
        if claim_id is None and isinstance(text, str) and isinstance(evidence, str | None):
            claim_id = _id_by_content(text, evidence)
        return ParsedClaim(
            Claim(
                claim_id=claim_id if claim_id is not None else "?",
                position=record.position,
                text=text,
                evidence=evidence or None,
                gold=gold,
            ),
            label,
            without,
            partly,
        )

    def _gold(self, value: Any) -> tuple[str, str | None]:
        """A label as the file spells it, and the prompt's label for it."""
        label = label_text(value)
        if label is None:
            return "", None
        if label.isdecimal() and int(label) < len(self._format.classes):
            label = self._format.classes[int(label)]
        shown = label[:_SHOWN_LABEL_CHARS]
        if label not in self._golds and len(self._golds) < 10_000:
            self._golds[label] = self._meaning(label)
        return shown, self._golds.get(label)

    def _meaning(self, label: str) -> str | None:
        if label.encode(errors="replace").decode() != label:
            return label  # not UTF-8: it is rejected with its claim
        self.labels_unused.discard(normalized(label))
        mapped = self._label_map.get(normalized(label))
        if mapped is not None:
            return self._prompt.label_of(mapped)
        return self._prompt.label_of(label) or self._prompt.label_of(
            self._format.labels.get(label.casefold(), label)
        )

    def _note_keys(self, fields: Mapping[str, Any]) -> None:
        if self.unseen_columns:
            self.unseen_columns.difference_update(fields)
        if len(self.keys_seen) < 100 and not self.keys_seen.keys() >= fields.keys():
            self.keys_seen.update(dict.fromkeys(fields))
            if self._format.read is read_plain:
                known = set(map(normalized, self.keys_seen))
                found = ([n for n in NAMES[f] if n in known] for f in _COMPARED)
                self._rivals = tuple(tuple(names) for names in found if len(names) > 1)

    def _not_json(self, record: Record, error: ValueError) -> Rejection:
        assert isinstance(record.content, bytes)
        try:
            record.content.decode()
        except UnicodeDecodeError:
            reason = "the line is not UTF-8"
            return self._reject(record, None, "not UTF-8", reason, _NEXT_STEPS["string_unicode"])
        reason = f"Invalid JSON: {_WHERE_IN_LINE.sub('at column', str(error))}"
        return self._reject(record, None, "not JSON", reason, _WRITE_JSON)

    def _invalid(
        self, record: Record, error: ValidationError, raw: RawClaim, fields: Mapping[str, Any]
    ) -> Rejection:
        fault = error.errors(include_url=False)[0]
        field = _FIELDS.get(str(fault["loc"][0])) if fault["loc"] else None
        message, kind = fault["msg"], fault["type"].replace("_", " ")
        next_step = _NEXT_STEPS.get(fault["type"], "correct it, or leave the line out")
        if field == "claim" and raw.claim is None:
            column = self._columns.get("claim")
            named = CLAIM_NAMES if column is None else {normalized(column)}
            if not named.isdisjoint(map(normalized, fields)):
                step = _NEXT_STEPS["string_too_short"]
                return self._reject(record, field, "claim: blank", "it is blank", step)
            listed = ", ".join(list(self.keys_seen)[:12])
            next_step = (
                f"every line needs a `claim`; the keys are {listed}. If one of them is the claim, "
                "name it with --column claim=NAME"
            )
            if (inside := _key_of_records(fields)) is not None:
                path = f".{inside}[]" if isinstance(fields[inside], list) else ".[]"
                next_step = (
                    f"the records are inside {inside!r}; write each of them as a line, with "
                    f"`jq -c '{path}' FILE`"
                )
            return self._reject(record, field, "no claim", "Field required", next_step)
        if field == "claim" and isinstance(raw.claim, dict):
            next_step = "if it is a column, write the file by records: to_json(orient='records')"
        if fault["type"] == "string_pattern_mismatch":
            blank = "\0" not in str(fault.get("input", ""))
            message = "it is blank" if blank else "it contains a NUL character"
            kind = "blank" if blank else "NUL character"
        return self._reject(
            record, field, f"{field}: {kind}" if field else kind, message, next_step
        )

    def _reject(
        self, record: Record, field: str | None, kind: str, reason: str, next_step: str
    ) -> Rejection:
        if isinstance(record.content, bytes):
            content = record.content.decode("utf-8", errors="replace").rstrip("\r\n")
        else:
            content = json.dumps(dict(record.content), ensure_ascii=False, default=str)
        return Rejection(
            source=self._source_name,
            line=record.line,
            field=field,
            kind=kind,
            reason=reason,
            next_step=next_step,
            content=content[:_SHOWN_CHARS].encode(errors="replace").decode(),
        )


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises InputError for an unknown field."""
    unknown = sorted(columns.keys() - NAMES.keys())
    if unknown:
        raise InputError(
            f"--column {unknown[0]}=…: there is no such field; the fields are {', '.join(NAMES)}"
        )


def _repeated_key(content: bytes, parsed: object) -> str | None:
    """A key that an object has twice with different values, of which the parser takes the last."""
    if content.count(b'":') == _keys(parsed):
        return None
    repeated: list[str] = []

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.extend(key for key, value in pairs if found[key] != value)
        return found

    json.loads(content, object_pairs_hook=check, parse_int=str)
    return repeated[0] if repeated else None


def _keys(value: Any) -> int:
    """The number of keys in it, at any depth."""
    if isinstance(value, dict):
        return len(value) + sum([_keys(v) for v in value.values() if type(v) in (dict, list)])
    return sum([_keys(v) for v in value if type(v) in (dict, list)])


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) and not is_missing(value)


def _id_by_content(claim: str, evidence: str | None) -> str:
    """An id that depends only on the claim and its evidence."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(claim.encode(errors="surrogateescape"))
    digest.update(b"\0")
    digest.update((evidence or "").encode(errors="surrogateescape"))
    return f"c-{digest.hexdigest()}"


def _key_of_records(fields: Mapping[str, Any]) -> str | None:
    """The first key whose value is a record with a claim, or a list of such records."""
    for key, value in fields.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and not CLAIM_NAMES.isdisjoint(map(normalized, first)):
            return key
    return None
