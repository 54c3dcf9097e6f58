"""Orders claims so that those with the same evidence follow each other.

An engine then computes the evidence once.
"""

from collections.abc import Iterable, Iterator

from services.contracts import Claim

WINDOW_CLAIMS = 16_384
# Python keeps a character in up to four bytes: with this many, 64 MiB.
WINDOW_CHARS = 16 * 1024 * 1024


def group_by_evidence(
    claims: Iterable[Claim],
    *,
    window_claims: int = WINDOW_CLAIMS,
    window_chars: int = WINDOW_CHARS,
) -> Iterator[Claim]:
    """The same claims, grouped by their evidence within a bounded window.

    Groups are in the order of their first claims, and claims keep their order in a group. A claim
    without evidence is a group by itself.
    """
    window: list[Claim] = []
    chars = 0
    for claim in claims:
        window.append(claim)
        chars += len(claim.text) + len(claim.evidence or "")
        if len(window) >= window_claims or chars >= window_chars:
            yield from _grouped(window)
            window, chars = [], 0
    yield from _grouped(window)


def _grouped(window: Iterable[Claim]) -> Iterator[Claim]:
    groups: dict[str | int, list[Claim]] = {}
    for number, claim in enumerate(window):
        groups.setdefault(number if claim.evidence is None else claim.evidence, []).append(claim)
    for group in groups.values():
        yield from group
