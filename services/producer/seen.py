"""The ids seen so far, on disk: duplicates are found among 10 million claims in constant memory."""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from enum import Enum

from services.contracts import Claim
from services.contracts.bounds import MAX_ID_CHARS

_CACHE_KIB = 8_192


class Sighting(Enum):
    """How a claim relates to those before it."""

    NEW = "new"
    REPEATED = "repeated"
    """The same id with the same content."""
    OTHER_EVIDENCE = "other evidence"
    """New: the same id and text as before with other evidence; the claim has an id of its own."""
    CONTRADICTED = "contradicted"
    """The same id with another text, or with another label for the same evidence."""


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
        self._database.execute(
            "CREATE TABLE seen (id INTEGER PRIMARY KEY, text INTEGER, body INTEGER, gold INTEGER)"
        )

    def close(self) -> None:
        self._database.close()

    def check(self, claims: Sequence[Claim]) -> list[tuple[Sighting, Claim]]:
        """One sighting per claim, in order, and the claim, whose id may be changed; from now on
        these are among the seen.
        """
        execute = self._database.execute
        execute("BEGIN")
        sightings = [self._check(execute, claim) for claim in claims]
        execute("COMMIT")
        return sightings

    def _check(
        self, execute: Callable[..., sqlite3.Cursor], claim: Claim
    ) -> tuple[Sighting, Claim]:
        evidence = claim.evidence or ""
        text, body = _digest(claim.text), _digest(f"{claim.text}\0{evidence}")
        row = (_digest(claim.claim_id), text, body, _digest(claim.gold or ""))
        if execute("INSERT INTO seen VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", row).rowcount:
            return Sighting.NEW, claim
        before = execute("SELECT * FROM seen WHERE id = ?", row[:1]).fetchone()
        if before == row:
            return Sighting.REPEATED, claim
        # By content, so that it does not depend on which records `--limit` draws.
        suffix = "#" + hashlib.blake2b(evidence.encode(), digest_size=4).hexdigest()
        if before[1] != text or before[2] == body or claim.claim_id.endswith(suffix):
            return Sighting.CONTRADICTED, claim
        own = claim.claim_id[: MAX_ID_CHARS - len(suffix)] + suffix
        sighting, renamed = self._check(execute, claim.model_copy(update={"claim_id": own}))
        return (Sighting.OTHER_EVIDENCE if sighting is Sighting.NEW else sighting), renamed


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
