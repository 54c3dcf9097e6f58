"""The ids seen so far, on disk: duplicates are found among 10 million claims in constant memory."""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from enum import Enum

from services.contracts import Claim

_CACHE_KIB = 8_192


class Sighting(Enum):
    """How a claim relates to those before it."""

    NEW = "new"
    REPEATED = "repeated"
    """The same id with the same content."""
    CONTRADICTED = "contradicted"
    """The same id with other content."""


class SeenIds:
    """64-bit digests of ids and contents, in a temporary SQLite database without a name.

    Two of 10 million ids share a digest with a probability of 3e-6; then the later one is rejected,
    not lost silently.
    """

    def __init__(self) -> None:
        # "" is a database of this connection alone, on disk once it outgrows the cache.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE seen (id INTEGER PRIMARY KEY, content INTEGER)")

    def close(self) -> None:
        self._database.close()

    def look(self, claims: Sequence[Claim]) -> list[Sighting]:
        """One sighting per claim, in order; from now on these are among the seen."""
        execute = self._database.execute
        execute("BEGIN")
        sightings = [self._look(execute, claim) for claim in claims]
        execute("COMMIT")
        return sightings

    @staticmethod
    def _look(execute: Callable[..., sqlite3.Cursor], claim: Claim) -> Sighting:
        content = f"{claim.text}\0{claim.evidence or ''}\0{claim.gold or ''}"
        row = (_digest(claim.claim_id), _digest(content))
        if execute("INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", row).rowcount:
            return Sighting.NEW
        (content,) = execute("SELECT content FROM seen WHERE id = ?", row[:1]).fetchone()
        return Sighting.REPEATED if content == row[1] else Sighting.CONTRADICTED


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
