"""A line becomes a claim, or a rejection that says what is wrong and what to do."""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from services.contracts import Claim, PromptSpec
from services.contracts.bounds import ClaimText, EvidenceText, Identity
from services.contracts.errors import InputError
from services.producer.source import Line, Source

_SHOWN_CHARS = 500
# The JSON parser sees one line of the file and counts it as its first.
_WHERE_IN_LINE = re.compile(r"at line 1 column")

_NAMES = {
    "id": ("id", "unique_id", "claim_id"),
    "claim": ("claim",),
    "evidence": ("evidence", "evidence_sentence", "evidence_text"),
    "label": ("label", "gold_label", "claim_label"),
}
"""The names by which FEVER, FEVER Symmetric and VitaminC call our fields."""

_NEXT_STEPS = {
    "json_invalid": "write one JSON object a line, in UTF-8",
    "missing": "every line needs a `claim`",
    "model_type": 'write an object, like {"claim": "…", "evidence": "…", "label": "…"}',
    "string_type": "put the text in quotes",
    "string_too_long": "shorten it, or split the claim",
    "string_too_short": "give it some text, or leave the line out",
    "string_pattern_mismatch": "remove NUL characters, and give it more than white space",
    "string_unicode": "save the file as UTF-8",
}


class Rejection(BaseModel):
    """A line that is no claim, as a row of `rejected.jsonl`."""

    model_config = ConfigDict(frozen=True)

    source: str
    line: int
    field: str | None
    reason: str
    next_step: str
    content: str
    """The line itself, cut at 500 characters."""


def _identity(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value == "" else value


def _evidence(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    # FEVER's own files have lists of page and sentence numbers here, without the text.
    return " ".join(value) if all(isinstance(part, str) for part in value) else None


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: Annotated[Identity | None, BeforeValidator(_identity)] = Field(
        None, validation_alias=AliasChoices(*_NAMES["id"])
    )
    claim: ClaimText
    evidence: Annotated[EvidenceText | None, BeforeValidator(_evidence)] = Field(
        None, validation_alias=AliasChoices(*_NAMES["evidence"])
    )
    label: str | None = Field(None, validation_alias=AliasChoices(*_NAMES["label"]))


class Parser:
    """Turns the lines of one source into claims for one prompt.

    `columns` renames columns: our field (`id`, `claim`, `evidence`, `label`) to the file's.
    """

    def __init__(
        self, source: Source, prompt: PromptSpec, columns: Mapping[str, str] | None = None
    ) -> None:
        """Raises InputError when a named column is unknown, or no CSV column can be the claim."""
        self._source_name = source.name
        self._prompt = prompt
        self._columns = dict(columns or {})
        unknown = sorted(self._columns.keys() - _NAMES.keys())
        if unknown:
            raise InputError(
                f"--column {unknown[0]}=…: there is no such field; the fields are "
                f"{', '.join(_NAMES)}"
            )
        self.ignored_columns: tuple[str, ...] = ()
        if source.format == "csv":
            self._check_header(source.columns())

    def _check_header(self, header: list[str]) -> None:
        doubled = next((name for name in header if header.count(name) > 1), None)
        if doubled is not None:
            raise InputError(
                f"{self._source_name}, line 1: two columns are called {doubled!r}; rename one"
            )
        listed = ", ".join(repr(name) for name in header[:20]) or "none"
        for field, column in self._columns.items():
            if column not in header:
                raise InputError(
                    f"{self._source_name}, line 1: there is no column {column!r} for {field}; "
                    f"the columns are {listed}"
                )
        if "claim" not in self._columns and "claim" not in header:
            raise InputError(
                f"{self._source_name}, line 1: no column is called 'claim'; the columns are "
                f"{listed}. Name the one that holds it with --column claim=NAME"
            )
        known = set(self._columns.values()).union(*_NAMES.values())
        self.ignored_columns = tuple(name for name in header if name not in known)

    def parse(self, line: Line) -> Claim | Rejection:
        """The claim on this line, or why there is none."""
        if line.fault is not None:
            return self._reject(line, None, line.fault, "mend the line, or leave it out")
        try:
            record = self._record(line.content)
        except ValidationError as error:
            return self._explain(line, error)
        gold = None
        if record.label:
            gold = self._prompt.label_of(record.label)
            if gold is None:
                known = ", ".join(self._prompt.label_names)
                return self._reject(
                    line,
                    "label",
                    f"unknown label {record.label[:80]!r}",
                    f"the prompt {self._prompt.name!r} knows {known}; correct the label, or add it "
                    "as an alias in the prompt file",
                )
        return Claim(
            claim_id=record.id or _id_by_content(record.claim, record.evidence),
            position=line.position,
            text=record.claim,
            evidence=record.evidence or None,
            gold=gold,
        )

    def contradicted(self, line: Line, claim: Claim) -> Rejection:
        """For a claim whose id an earlier line has for other content."""
        return self._reject(
            line,
            "id",
            f"the id {claim.claim_id[:80]!r} stands on an earlier line with other content",
            "give it an id of its own, or none at all",
        )

    def _record(self, content: bytes | Mapping[str, str]) -> _Record:
        if isinstance(content, bytes):
            if not self._columns:
                return _Record.model_validate_json(content.rstrip())
            fields: Any = _Any.model_validate_json(content.rstrip()).model_dump()
        else:
            fields = content
        renamed = {name: fields[name] for name in fields if name not in self._columns}
        renamed |= {field: fields[name] for field, name in self._columns.items() if name in fields}
        return _Record.model_validate(renamed)

    def _explain(self, line: Line, error: ValidationError) -> Rejection:
        fault = error.errors(include_url=False)[0]
        field = str(fault["loc"][0]) if fault["loc"] else None
        next_step = _NEXT_STEPS.get(fault["type"], "correct it, or leave the line out")
        message = fault["msg"]
        if fault["type"] == "json_invalid":
            message = _WHERE_IN_LINE.sub("at column", message)
            if not _is_utf8(line.content):
                message, next_step = "the line is not UTF-8", _NEXT_STEPS["string_unicode"]
        if fault["type"] == "string_pattern_mismatch":
            message = (
                "it contains a NUL character"
                if "\0" in str(fault.get("input", ""))
                else "it is blank"
            )
        return self._reject(line, field, message, next_step)

    def _reject(self, line: Line, field: str | None, reason: str, next_step: str) -> Rejection:
        content = (
            line.content.decode("utf-8", errors="replace").rstrip("\r\n")
            if isinstance(line.content, bytes)
            else repr(dict(line.content))
        )
        return Rejection(
            source=self._source_name,
            line=line.number,
            field=field,
            reason=reason,
            next_step=next_step,
            content=content[:_SHOWN_CHARS],
        )


class _Any(BaseModel):
    model_config = ConfigDict(extra="allow")


def _is_utf8(content: bytes | Mapping[str, str]) -> bool:
    try:
        return isinstance(content, Mapping) or bool(content.decode())
    except UnicodeDecodeError:
        return False


def _id_by_content(claim: str, evidence: str | None) -> str:
    """The same claim with the same evidence has the same id, in every file and on every day."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(claim.encode())
    digest.update(b"\0")
    digest.update((evidence or "").encode())
    return f"c-{digest.hexdigest()}"
