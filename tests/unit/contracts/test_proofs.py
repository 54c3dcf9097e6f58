"""Proofs of claims, digests of runs, and which records of a file are claims."""

import contextlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Claim
from services.contracts.proofs import (
    ClaimsDigest,
    Positions,
    all_equal,
    claim_proof,
    evidence_digest,
    new_key,
    split_verdict_proof,
    verdict_proof,
)

KEY = bytes(16)
CLAIM = Claim(claim_id="c-1", position=7, text="Łódź.", evidence="A city.", gold="SUPPORTS")
sets = st.sets(st.tuples(st.text(min_size=1, max_size=8), st.integers(0, 2**40)), max_size=20)


@pytest.mark.parametrize(
    "changes",
    [
        {"claim_id": "c-2"},
        {"position": 8},
        {"text": "Lodz."},
        {"evidence": "A town."},
        {"evidence": ""},
        {"evidence": None},
        {"gold": "REFUTES"},
        {"gold": None},
    ],
    ids=str,
)
def test_a_claim_that_was_changed_in_any_part_has_another_proof(changes: dict[str, object]) -> None:
    assert CLAIM.model_copy(update=changes).proof(KEY) != CLAIM.proof(KEY)


def test_without_the_key_nobody_can_make_a_proof() -> None:
    assert CLAIM.proof(bytes.fromhex(new_key())) != CLAIM.proof(bytes.fromhex(new_key()))


def test_a_verdict_proves_the_same_without_the_evidence() -> None:
    proof, evidence = split_verdict_proof(verdict_proof(CLAIM.proof(KEY), CLAIM.evidence))
    assert evidence == evidence_digest(CLAIM.evidence)
    assert claim_proof(KEY, "c-1", 7, "Łódź.", "SUPPORTS", evidence) == proof
    assert split_verdict_proof(verdict_proof(proof, None)) == (proof, "")


def test_proofs_are_compared_as_a_whole_and_in_order() -> None:
    assert all_equal(["a", "b"], iter(["a", "b"]))
    assert not all_equal(["a", "b"], ["b", "a"])
    assert not all_equal(["a"], ["a", "b"])


@given(claims=sets, shuffled=st.randoms())
def test_a_digest_does_not_depend_on_the_order_and_adds_up(
    claims: set[tuple[str, int]], shuffled: Random
) -> None:
    one, other = sorted(claims), sorted(claims)
    shuffled.shuffle(other)
    whole = ClaimsDigest.of(one)
    assert ClaimsDigest.of(other) == whole
    half = len(other) // 2
    first, second = ClaimsDigest.of(other[:half]), ClaimsDigest.of(other[half:])
    assert first.plus(second) == whole
    assert max(whole.high, whole.low) < 2**62


@pytest.mark.parametrize(
    "others",
    [
        [("a", 0)],
        [("a", 0), ("b", 1), ("b", 1)],
        [("a", 1), ("b", 0)],
        [("a", 0), ("c", 1)],
        [("a", 0), ("b", 2)],
    ],
    ids=["missing", "doubled", "swapped", "foreign", "elsewhere"],
)
def test_other_claims_have_another_digest(others: list[tuple[str, int]]) -> None:
    assert str(ClaimsDigest.of(others)) != str(ClaimsDigest.of([("a", 0), ("b", 1)]))


@given(positions=st.sets(st.integers(0, 5_000)), gone=st.sets(st.integers(0, 6_000)))
def test_positions_are_encoded_in_a_message_and_the_missing_ones_found(
    positions: set[int], gone: set[int]
) -> None:
    told = Positions()
    told.add(positions)
    text = told.as_text()
    assert text is not None
    left = Positions.of_text(text)
    left.discard(gone)
    found = [n for first, last in left.ranges(10_000) for n in range(first, last + 1)]
    assert found == sorted(positions - gone)


def test_the_number_of_ranges_is_bounded() -> None:
    told = Positions()
    told.add([1, 2, 3, 7, 9, 10])
    assert told.ranges(2) == [(1, 3), (7, 7)]


@pytest.mark.parametrize("text", ["", "!", "AAAA", "eJw="])
def test_what_is_no_text_of_positions_is_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert Positions.of_text(text).ranges(1) == []
