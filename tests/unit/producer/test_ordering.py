"""Claims with the same evidence beside each other, and nothing else about them changed."""

from collections.abc import Iterator
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Claim
from services.producer.ordering import group_by_evidence

EVIDENCE = st.none() | st.sampled_from(["North.", "South.", "East.", "West.", "0", "1"])


def claims_with(evidence: list[str | None]) -> list[Claim]:
    return [
        Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.", evidence=one)
        for n, one in enumerate(evidence)
    ]


def ids(evidence: list[str | None], **bounds: int) -> list[str]:
    return [claim.claim_id for claim in group_by_evidence(claims_with(evidence), **bounds)]


def test_claims_go_beside_the_first_one_with_their_evidence() -> None:
    assert ids(["N", "S", "N", "E", "S", "N"]) == ["c0", "c2", "c5", "c1", "c4", "c3"]


def test_claims_without_evidence_share_none_and_keep_their_places() -> None:
    assert ids([None, "N", None, None, "N"]) == ["c0", "c1", "c4", "c2", "c3"]
    assert ids([None, None, None]) == ["c0", "c1", "c2"]


@given(st.lists(EVIDENCE), st.integers(1, 12))
def test_every_claim_is_there_once_and_unchanged(evidence: list[str | None], window: int) -> None:
    claims = claims_with(evidence)
    ordered = list(group_by_evidence(claims, window_claims=window))
    assert sorted(ordered, key=lambda claim: claim.position) == claims


@given(st.lists(EVIDENCE))
def test_each_evidence_is_one_group_in_the_order_of_first_appearance(
    evidence: list[str | None],
) -> None:
    ordered = list(group_by_evidence(claims_with(evidence)))
    shared = [claim for claim in ordered if claim.evidence is not None]
    groups = [[claim.position for claim in g] for _, g in groupby(shared, lambda c: c.evidence)]
    assert len(groups) == len({claim.evidence for claim in shared})
    assert groups == sorted(groups)
    assert all(group == sorted(group) for group in groups)
    alone = [claim.position for claim in ordered if claim.evidence is None]
    assert alone == sorted(alone)


@given(st.lists(EVIDENCE, max_size=40), st.integers(1, 12))
def test_no_claim_leaves_its_window(evidence: list[str | None], window: int) -> None:
    ordered = group_by_evidence(claims_with(evidence), window_claims=window)
    for place, claim in enumerate(ordered):
        assert claim.position // window == place // window


@given(st.lists(EVIDENCE, max_size=60), st.integers(1, 12), st.integers(1, 100))
def test_no_more_is_held_than_the_window_has_room_for(
    evidence: list[str | None], window: int, chars: int
) -> None:
    read: list[Claim] = []

    def reading() -> Iterator[Claim]:
        for claim in claims_with(evidence):
            read.append(claim)
            yield claim

    given_on = 0
    for _ in group_by_evidence(reading(), window_claims=window, window_chars=chars):
        held = read[given_on:]
        assert len(held) <= window
        # All but the last one fit.
        assert sum(len(c.text) + len(c.evidence or "") for c in held[:-1]) < chars
        given_on += 1
    assert given_on == len(evidence)


def test_a_window_ends_with_the_text_that_fills_it() -> None:
    # "Claim 0." has 8 characters, and so has the evidence.
    evidence = ["evidence", "another1", "evidence", "another1"]
    assert ids(evidence, window_chars=33) == ["c0", "c2", "c1", "c3"]
    assert ids(evidence, window_chars=32) == ["c0", "c1", "c2", "c3"]
