"""Finds duplicate claims: the ids seen so far, on disk, so that memory stays constant."""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from services.contracts import Claim
from services.contracts.bounds import MAX_ID_CHARS
from services.contracts.claims import own_id_suffix

_CACHE_KIB = 8_192


class Duplicate(Enum):
    """How a claim relates to the claims before it."""

    NEW = "new"
    REPEATED = "repeated"
    """The same id with the same content, and the same label or none."""
    OTHER_EVIDENCE = "other evidence"
    """New: the same id and text as before with other evidence; the claim gets its own id."""
    LABELLED = "labelled"
    """The same id with the same content, and the first label for it."""
    OTHER_TEXT = "other text"
    """The same id with another text."""
    OTHER_LABEL = "other label"
    """The same id, text and evidence with another label."""


class Seen(NamedTuple):
    """How a claim relates to earlier ones, the claim (its id may have changed), and the position of
    the earlier one.
    """

    duplicate: Duplicate
    claim: Claim
    earlier: int


class SeenIds:
    """64-bit digests of ids and contents, in a temporary SQLite database without a name.

    Two of 10 million ids share a digest with a probability of 3e-6; then the later one is rejected,
    not lost silently.
    """

    def __init__(self) -> None:
        # "" is a temporary database, on disk when it outgrows the cache.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(
            "CREATE TABLE seen (id INTEGER PRIMARY KEY, text INTEGER, body INTEGER, gold INTEGER, "
            "position INTEGER)"
        )

    def close(self) -> None:
        self._database.close()

    def check(self, claims: Sequence[Claim], labels: Sequence[str] | None = None) -> list[Seen]:
        """One result for each claim, in order. The claims are added to those seen. `labels` are the
        claims' labels as the file spells them, for labels that the prompt does not know.
        """
        execute = self._database.execute
        execute("BEGIN")
        results = [
            self._check(execute, claim, claim.gold or label)
            for claim, label in zip(claims, labels or [""] * len(claims), strict=True)
        ]
        execute("COMMIT")
        return results

    def _check(self, execute: Callable[..., sqlite3.Cursor], claim: Claim, label: str) -> Seen:
        evidence = claim.evidence or ""
        content = hashlib.blake2b(claim.text.encode(), digest_size=8)
        text = _number(content.digest())
        content.update(f"\0{evidence}".encode())
        body = _number(content.digest())
        row = (_digest(claim.claim_id), text, body, _label_digest(label), claim.position)
        if execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row).rowcount:
            return Seen(Duplicate.NEW, claim, claim.position)
        *before, earlier = execute("SELECT * FROM seen WHERE id = ?", row[:1]).fetchone()
        if before[:3] == list(row[:3]) and row[3] in (before[3], _NO_LABEL):
            return Seen(Duplicate.REPEATED, claim, earlier)
        if before[:3] == list(row[:3]) and before[3] == _NO_LABEL:
            execute("UPDATE seen SET gold = ?, position = ? WHERE id = ?", (*row[3:], row[0]))
            return Seen(Duplicate.LABELLED, claim, earlier)
        if before[1] != text:
            return Seen(Duplicate.OTHER_TEXT, claim, earlier)
        suffix = own_id_suffix(evidence)
        if before[2] == body or claim.claim_id.endswith(suffix):
            return Seen(Duplicate.OTHER_LABEL, claim, earlier)
        own = claim.claim_id[: MAX_ID_CHARS - len(suffix)] + suffix
        found = self._check(execute, claim.model_copy(update={"claim_id": own}), label)
        if found.duplicate is Duplicate.NEW:
            return found._replace(duplicate=Duplicate.OTHER_EVIDENCE)
        return found

    def same_contents(self) -> tuple[int, int]:
        """The number of new claims that have the text and evidence of an earlier one under another
        id, and the number of such texts that have several labels.
        """
        same, labels = self._database.execute(
            "SELECT sum(n - 1), sum(low <> high) FROM (SELECT count(*) AS n, min(label) AS low, "
            "max(label) AS high FROM (SELECT body, nullif(gold, ?) AS label FROM seen) "
            "GROUP BY body)",
            (_NO_LABEL,),
        ).fetchone()
        return same or 0, labels or 0


def _digest(text: str) -> int:
    return _number(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big", signed=True)


_label_digest = lru_cache(maxsize=1024)(_digest)
_NO_LABEL = _digest("")
