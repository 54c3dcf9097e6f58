"""The names of a record's fields, and the text in their values."""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from services.contracts.prompts import whole_number

NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "unique_id", "claim_id", "uid"),
    "claim": ("claim", "statement", "claim_text"),
    "evidence": (
        *("evidence", "evidence_sentence", "evidence_text", "evidences", "gold_evidence"),
        *("evidence_sentences", "doc", "document", "passage"),
    ),
    "label": ("label", "gold_label", "claim_label", "gold", "verdict"),
}
"""The names that data sets use for each field, in order of preference."""

CLAIM_NAMES = frozenset(NAMES["claim"])
_TEXTS = frozenset(name for field in ("id", "claim", "label") for name in NAMES[field])

# Keys of an object that hold its text, the best first.
_TEXT_KEYS = (
    *("evidence", "text", "evidence_text", "evidence_sentence", "sentence", "sentences", "content"),
    *("passage", "snippet", "quote", "body", "abstract", "doc", "document", "answer", "answers"),
)
# Keys of names and numbers of a text, in objects whose text has an unknown key.
_NO_TEXT_KEYS = re.compile(
    # Whole words: a headline, an outline and an update are texts.
    r"(.*_)?(id|ids|title|url|uri|link|label|labels|page|article|source|key|name|date|type|line)"
    r"|(doc|document|page|sent|sentence|wiki|wikipedia|article|evidence)(id|ids|title|url|line)"
)
_OPENING = ("[", "{", "array([")
# What numpy and pandas write into a list that Python's literals do not have: values without commas
# between them, names of functions around values, and names of missing values. Texts are matched
# as a whole, so that nothing in them is changed.
_NOT_LITERAL = re.compile(
    r"""(?P<value>'(?:[^'\\]|\\.|\\\Z)*(?:'|\Z)|"(?:[^"\\]|\\.|\\\Z)*(?:"|\Z)|[\])}]"""
    r"""|\b[\d.]+(?:e[+-]?\d+)?|\.\.\.|\bNone\b|(?P<missing>\b(?:nan|NaN|NaT|inf)\b|<NA>))"""
    r"""(?P<gap>\s+(?=['"\[({\w<+.-]))?|\b(?:array|np\.\w+)(?=\()|,\s*dtype=[^)]*""",
    re.DOTALL,
)
# What programs write for a missing value: Python, pandas, R, MySQL, people.
_BLANK = frozenset(("[]", "{}", "nan", "none", "null", "<na>", "na", "n/a", "\\n", "-"))
_LEFT_OUT = "\0"
"""Noted as unused for the middle of a long array, which numpy writes as `...`. No text has it."""
_MOST_DEPTH = 16
# A page's title does not end in a full stop, and rarely has this many words.
_SENTENCE = re.compile(r"[.!?…。][\"')\]\u201d\u2019]*\s*$")
_SENTENCE_WORDS = 8
_URLS = re.compile(r"\s*https?://\S+(?:\s+https?://\S+)*\s*")


class WithoutEvidence(StrEnum):
    """Why a claim has no evidence."""

    NONE = "the record has none"
    REFERENCES = "page references without text"
    NO_TEXT = "no text was found in it"
    NOT_FOUND = "its pages are not in the corpus"


@lru_cache(maxsize=4096)
def normalized(name: str) -> str:
    """A column's name for comparison: without case, spaces and hyphens."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def field_of(name: str) -> str:
    """The field that has this name: `verdict` -> label."""
    return next(field for field, names in NAMES.items() if normalized(name) in names)


def is_header(fields: Sequence[str]) -> bool:
    """Whether a record has the names of columns: a known one, and no sentence."""
    known = any(normalized(field) in names for field in fields for names in NAMES.values())
    return known and not any(map(_is_sentence, fields))


def is_missing(value: Any) -> bool:
    """Whether a value is missing: null, an empty text or list, or NaN."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value
    if isinstance(value, list | dict):
        return not value
    return isinstance(value, float) and math.isnan(value)


def named_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's values by the names that are compared; its lists and objects as such."""
    named: dict[str, Any] = {}
    for key, value in record.items():
        name = normalized(key)
        if name in named and not is_missing(named[name]):
            continue
        if isinstance(value, str) and value.startswith(_OPENING) and name not in _TEXTS:
            value = structured(value)
        named[name] = value
    return named


def first_of(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these fields that is not missing, or None."""
    for name in names:
        value = fields.get(name)
        if value is not None and not is_missing(value):
            return value
    return None


def id_text(value: Any) -> Any:
    """An id as text: 7, 7.0, "7" and "7.0" are the same. Pandas writes 7.0 where ids are missing,
    databases write decimals.

    Any other value is returned unchanged, and rejected later.
    """
    if is_missing(value):
        return None
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if isinstance(value, str) and value.endswith(".0") and value[:-2].isdecimal():
        value = value[:-2]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def label_text(value: Any) -> str | None:
    """A label as text; None for a missing one."""
    if is_missing(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    text = str(value).strip()
    return whole_number(text) or text or None


def structured(value: Any) -> Any:
    """The list or object that a text writes in JSON or, as pandas and numpy do, in Python; any
    other value as it is.
    """
    if not isinstance(value, str) or not value.startswith(_OPENING):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                found = ast.literal_eval(_NOT_LITERAL.sub(_as_literal, value.strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value
    return found if isinstance(found, list | tuple | dict) else value


def _as_literal(found: re.Match[str]) -> str:
    text = "None" if found["missing"] else found["value"] or ""
    return f"{text}," if found["gap"] else text


class Evidence(NamedTuple):
    """The text in a record's evidence; or None, and why. `partly`: not all its text is in it."""

    text: str | None
    without: WithoutEvidence | None
    partly: bool = False


def _is_blank(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) <= 4 and (not stripped or stripped.casefold() in _BLANK)


def evidence_text(value: Any) -> Evidence:
    """The text in evidence of any structure, joined by spaces; or why there is none."""
    value = structured(value)
    if isinstance(value, str):
        if _is_blank(value):
            return Evidence(None, WithoutEvidence.NONE)
        return (
            Evidence(None, WithoutEvidence.REFERENCES) if _is_url(value) else Evidence(value, None)
        )
    if is_missing(value):
        return Evidence(None, WithoutEvidence.NONE)
    unused: list[str] = []
    text = " ".join(dict.fromkeys(_texts(value, 0, unused)))
    if text and not _is_url(text):
        return Evidence(text, None, any(part.strip() not in text for part in unused))
    referring = text or has_numbers(value)
    return Evidence(None, WithoutEvidence.REFERENCES if referring else WithoutEvidence.NO_TEXT)


def _is_url(text: str) -> bool:
    return text.lstrip()[:4] == "http" and _URLS.fullmatch(text) is not None


def _texts(value: Any, depth: int, unused: list[str]) -> Iterator[str]:
    """The texts in it. Those of several words that are left out are added to `unused`."""
    value = structured(value)
    if depth > _MOST_DEPTH:
        return
    if isinstance(value, str):
        if not _is_blank(value):
            yield value.strip()
    elif isinstance(value, Mapping):
        for key in _TEXT_KEYS:
            found = list(_texts(value.get(key), depth + 1, unused))
            if found:
                yield from found
                for name, part in value.items():
                    if name != key and not _names_no_text(name):
                        unused += (text for text in _texts(part, depth + 1, unused) if " " in text)
                return
        reference = any(map(_is_number, value.values()))
        for key, part in value.items():
            if _names_no_text(key) or (isinstance(part, str) and _is_number(part)):
                continue
            if reference and isinstance(part, str) and not _is_sentence(part):
                if " " in part:
                    unused.append(part)
            else:
                yield from _texts(part, depth + 1, unused)
    elif value is ...:
        unused.append(_LEFT_OUT)
    elif isinstance(value, list | tuple):
        yield from _texts_of_list(value, depth, unused)


def _texts_of_list(value: Sequence[Any], depth: int, unused: list[str]) -> Iterator[str]:
    """The texts of a list, without the titles of pages that it refers to. If its first text comes
    before a number, or is its only text and comes after one, such texts are titles, except
    sentences.
    """
    numbers = {n for n, part in enumerate(value) if _is_number(part)}
    if not numbers:
        for part in value:
            yield from _texts(part, depth + 1, unused)
        return
    texts = [n for n, part in enumerate(value) if isinstance(part, str) and n not in numbers]
    titles = [n for n in texts if n + 1 in numbers or (len(texts) == 1 and n - 1 in numbers)]
    if titles[:1] != texts[:1]:
        titles = []
    doubtful = any(isinstance(part, float) for part in value)  # 1.0 may be a score
    for n, part in enumerate(value):
        if n in titles and not _is_sentence(part):
            if " " in part and (doubtful or n != titles[0]):
                unused.append(part)
        elif n not in numbers or not texts:
            yield from _texts(part, depth + 1, unused)


def _names_no_text(key: object) -> bool:
    return _NO_TEXT_KEYS.fullmatch(normalized(str(key))) is not None


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().isdecimal()
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()  # any other is a score
    )


def is_name(text: str) -> bool:
    """Whether it is one word, as names of pages and documents are."""
    return text.isascii() and len(text.split()) == 1


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= _SENTENCE_WORDS or bool(
        _SENTENCE.search(text) and len(text.split()) > 2
    )


def has_numbers(value: Any, depth: int = 0) -> bool:
    """Whether it contains a number at any depth, as references to pages and sentences do."""
    if depth > _MOST_DEPTH:
        return False
    if isinstance(value, Mapping):
        return any(has_numbers(part, depth + 1) for part in value.values())
    if isinstance(value, list | tuple):
        return any(has_numbers(part, depth + 1) for part in value)
    return _is_number(value)
