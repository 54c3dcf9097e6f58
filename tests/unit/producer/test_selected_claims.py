"""The split of claims into a part to choose by and a part to report on."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Claim
from services.contracts.claims import own_id_suffix
from services.contracts.errors import InputError
from services.producer.selected_claims import selected_claims


def claim(number: int, evidence: str | None = None, **fields: object) -> Claim:
    values = {"claim_id": f"c{number}", "position": number, "text": "T.", "evidence": evidence}
    return Claim.model_validate(values | fields)


def parts(
    claims: Sequence[Claim], fraction: float = 0.5, seed: int = 0
) -> tuple[set[str], set[str]]:
    selected = set(selected_claims(claims, fraction, seed))
    return selected, {each.claim_id for each in claims} - selected


def test_the_selected_part_has_the_fraction_and_the_seed_decides() -> None:
    claims = [claim(number) for number in range(240)]
    selected, rest = parts(claims, 0.25)
    assert (len(selected), len(rest)) == (60, 180)
    assert parts(claims, 0.25) == (selected, rest)
    assert parts(claims, 0.25, seed=1) != (selected, rest)


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=60),
    st.floats(0.1, 0.9),
    st.integers(0, 100),
)
def test_claims_that_share_evidence_never_straddle_the_parts(
    evidence: list[int], fraction: float, seed: int
) -> None:
    claims = [claim(n, f"evidence {number}") for n, number in enumerate(evidence)]
    try:
        selected, rest = parts(claims, fraction, seed)
    except InputError:  # the groups are too large
        return
    of = {each.claim_id: each.evidence for each in claims}
    assert not {of[claim_id] for claim_id in selected} & {of[claim_id] for claim_id in rest}
    assert selected and len(selected) <= fraction * len(claims)


def test_claims_that_share_evidence_through_others_stay_together() -> None:
    # a and b are one record, b and c have the same evidence, c and d have the same id in the file.
    chain = [
        claim(0, "one"),
        claim(0, "two", claim_id="c0#2"),
        claim(1, "two"),
        claim(2, "three", claim_id="c1" + own_id_suffix("three")),
    ]
    others = [claim(number) for number in range(10, 20)]
    ids = {each.claim_id for each in chain}
    for seed in range(20):
        selected, rest = parts([*chain, *others], seed=seed)
        assert ids <= selected or ids <= rest


def test_claims_without_evidence_do_not_share_it() -> None:
    claims = [claim(0), claim(1), claim(2, ""), claim(3, "")]
    selected, rest = parts(claims)
    assert len(selected) == len(rest) == 2


@pytest.mark.parametrize("count", [0, 1, 8])
def test_claims_that_cannot_be_split_are_refused(count: int) -> None:
    claims = [claim(number, "the same") for number in range(count)]
    with pytest.raises(InputError, match="use more claims, or another fraction"):
        selected_claims(claims, 0.5, 0)
