"""What a record's fields are called, and the text that is in them."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any

NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "unique_id", "claim_id", "uid"),
    "claim": ("claim", "statement", "claim_text"),
    "evidence": (
        *("evidence", "evidence_sentence", "evidence_text", "evidences", "gold_evidence"),
        *("evidence_sentences", "doc", "document", "passage"),
    ),
    "label": ("label", "gold_label", "claim_label", "gold", "verdict"),
}
"""The names by which data sets call our fields, in the order in which they are looked for."""

CLAIM_NAMES = frozenset(NAMES["claim"])

# Keys of an object that hold its text, the best first.
_TEXT_KEYS = (
    *("evidence", "text", "evidence_text", "evidence_sentence", "sentence", "sentences", "content"),
    *("passage", "snippet", "quote", "body", "abstract", "doc", "document", "answer", "answers"),
)
_MOST_DEPTH = 16
# A page's title has no full stop at its end, and rarely so many words.
_SENTENCE = re.compile(r"[.!?…。][\"')\]\u201d\u2019]*\s*$")
_SENTENCE_WORDS = 8


class WithoutEvidence(StrEnum):
    """Why a claim has no evidence."""

    NONE = "the record has none"
    REFERENCES = "page references without text"
    NO_TEXT = "no text was found in it"
    NOT_FOUND = "its pages are not in the corpus"


@lru_cache(maxsize=4096)
def normalized(name: str) -> str:
    """A column's name as it is compared: case, spaces and hyphens do not matter."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def is_missing(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text or list, or not a number."""
    if value is None:
        return True
    if isinstance(value, str | list | dict):
        return not value
    return isinstance(value, float) and math.isnan(value)


def first_of(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these fields that says something, or None."""
    for name in names:
        value = fields.get(name)
        if not is_missing(value):
            return value
    return None


def identity_of(value: Any) -> Any:
    """An id as text: 7, 7.0 and "7" are the same. What is no id stays as it is, to be refused."""
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def label_text(value: Any) -> str | None:
    """A label as text; None where there is none."""
    if is_missing(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value).strip() or None


def evidence_text(value: Any) -> tuple[str | None, WithoutEvidence | None]:
    """The text in evidence of any shape, joined by spaces; or why there is none."""
    if isinstance(value, str):
        return (value, None) if value.strip() else (None, WithoutEvidence.NONE)
    if is_missing(value):
        return None, WithoutEvidence.NONE
    texts = list(dict.fromkeys(_texts(value, 0)))
    if texts:
        return " ".join(texts), None
    return None, WithoutEvidence.REFERENCES if has_numbers(value) else WithoutEvidence.NO_TEXT


def _texts(value: Any, depth: int) -> Iterator[str]:
    if depth > _MOST_DEPTH:
        return
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for key in _TEXT_KEYS:
            found = list(_texts(value.get(key), depth + 1))
            if found:
                yield from found
                return
    elif isinstance(value, list):
        # Numbers beside a text say where it stands: a page's title, then, is no evidence.
        reference = any(isinstance(part, int | float) for part in value)
        for part in value:
            if not (reference and isinstance(part, str) and not _is_sentence(part)):
                yield from _texts(part, depth + 1)


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= _SENTENCE_WORDS or bool(
        _SENTENCE.search(text) and len(text.split()) > 2
    )


def has_numbers(value: Any, depth: int = 0) -> bool:
    """Whether there is a number in it at any depth, as in references to pages and sentences."""
    if depth > _MOST_DEPTH:
        return False
    if isinstance(value, Mapping):
        return any(has_numbers(part, depth + 1) for part in value.values())
    if isinstance(value, list):
        return any(has_numbers(part, depth + 1) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)
