"""Proofs that a producer sent a claim, and that a run has the outcomes of all its claims.

docs/decisions/0032-proofs.md describes what they prove and what they do not.
"""

import base64
import hashlib
import hmac
import secrets
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, StringConstraints

from services.contracts.bounds import MAX_BATCH_CLAIMS

_KEY_BYTES = 16
_PROOF_BYTES = 12
_EVIDENCE_BYTES = 8
_PROOF_CHARS = 2 * _PROOF_BYTES
# The sum of two such numbers fits a store's column: a signed 64-bit integer.
MODULUS = 2**62
_MAX_POSITIONS_CHARS = 6 * 1024 * 1024
_MAX_POSITIONS_BYTES = 128 * 1024 * 1024

ProofKey = Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * _KEY_BYTES}}}$")]
Proof = Annotated[
    str, StringConstraints(pattern=rf"^[0-9a-f]{{0,{_PROOF_CHARS + 2 * _EVIDENCE_BYTES}}}$")
]
Proofs = Annotated[
    tuple[Proof, ...],
    Field(max_length=MAX_BATCH_CLAIMS, exclude_if=lambda proofs: not proofs),
]
"""One for each claim of a message, or none at all: older producers make none."""
DigestText = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PositionsText = Annotated[str, StringConstraints(max_length=_MAX_POSITIONS_CHARS)]


def new_key() -> str:
    return secrets.token_hex(_KEY_BYTES)


def evidence_digest(evidence: str | None) -> str:
    """The digest of the evidence, which verdicts do not carry; "" for no evidence."""
    if evidence is None:
        return ""
    return hashlib.blake2b(evidence.encode(), digest_size=_EVIDENCE_BYTES).hexdigest()


def claim_proof(
    key: bytes, claim_id: str, position: int, text: str, gold: str | None, evidence: str
) -> str:
    """The keyed digest (BLAKE2b, RFC 7693) of a claim; `evidence` is its `evidence_digest`.

    Producer and store have the key. No text may contain NUL, so NUL separates the parts.
    """
    content = f"{position}\0{evidence}\0{gold or ''}\0{claim_id}\0{text}"
    return hashlib.blake2b(content.encode(), digest_size=_PROOF_BYTES, key=key).hexdigest()


def verdict_proof(proof: str, evidence: str | None) -> str:
    """The proof in a verdict: its claim's proof and the digest of the evidence."""
    return proof + evidence_digest(evidence)


def split_verdict_proof(proof: str) -> tuple[str, str]:
    """The claim's proof, and the digest of its evidence."""
    return proof[:_PROOF_CHARS], proof[_PROOF_CHARS:]


def evidence_number(digest: str) -> int | None:
    """An `evidence_digest` as a signed 64-bit number, for a column; None without evidence."""
    return int(digest, 16) - 2**63 if digest else None


def all_equal(proofs: Iterable[str], expected: Iterable[str]) -> bool:
    """Compares in constant time, wherever the two differ."""
    return hmac.compare_digest("\n".join(proofs).encode(), "\n".join(expected).encode())


@dataclass(frozen=True, slots=True)
class ClaimsDigest:
    """A digest of a set of (claim id, position) that does not depend on their order: the sums,
    modulo 2**62, of the two halves of each one's BLAKE2b.

    It detects claims that are missing, doubled or foreign by mistake. An attacker who can choose
    many ids could forge a sum (Wagner, A Generalized Birthday Problem, 2002); proofs prevent that.
    """

    high: int = 0
    low: int = 0

    @classmethod
    def of(cls, claims: Iterable[tuple[str, int]]) -> Self:
        digests = b"".join(
            hashlib.blake2b(f"{position}\0{claim_id}".encode(), digest_size=16).digest()
            for claim_id, position in claims
        )
        halves = struct.unpack(f"<{len(digests) // 8}Q", digests)
        return cls(sum(halves[::2]) % MODULUS, sum(halves[1::2]) % MODULUS)

    def plus(self, other: Self) -> Self:
        return type(self)((self.high + other.high) % MODULUS, (self.low + other.low) % MODULUS)

    def __str__(self) -> str:
        return f"{self.high:016x}{self.low:016x}"


class Positions:
    """The positions of the input that have a claim; a bit for each position."""

    def __init__(self, bits: bytes = b"") -> None:
        self._bits = bytearray(bits)

    def add(self, positions: Iterable[int]) -> None:
        bits = self._bits
        for position in positions:
            byte_index = position >> 3
            if byte_index >= len(bits):
                bits.extend(bytes(byte_index + 1 - len(bits)))
            bits[byte_index] |= 1 << (position & 7)

    def discard(self, positions: Iterable[int]) -> None:
        bits = self._bits
        for position in positions:
            byte_index = position >> 3
            if byte_index < len(bits):
                bits[byte_index] &= ~(1 << (position & 7))

    def ranges(self, most: int) -> Sequence[tuple[int, int]]:
        """The first and last position of each of the first `most` consecutive ranges."""
        found: list[tuple[int, int]] = []
        for byte_index, byte in enumerate(self._bits):
            if not byte:
                continue
            for bit in range(8):
                position = 8 * byte_index + bit
                if not byte >> bit & 1:
                    continue
                if found and found[-1][1] == position - 1:
                    found[-1] = found[-1][0], position
                elif len(found) == most:
                    return found
                else:
                    found.append((position, position))
        return found

    def as_text(self) -> str | None:
        """Text for a message; None if it is too long for one."""
        text = base64.b64encode(zlib.compress(bytes(self._bits))).decode("ascii")
        return text if len(text) <= _MAX_POSITIONS_CHARS else None

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The inverse of `as_text`. Raises ValueError for any other text."""
        unpacking = zlib.decompressobj()
        try:
            return cls(unpacking.decompress(base64.b64decode(text), _MAX_POSITIONS_BYTES))
        except zlib.error as error:
            raise ValueError("the text does not encode positions") from error
