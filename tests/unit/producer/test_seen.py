import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Claim
from services.producer.seen import Duplicate, SeenIds


@pytest.fixture
def seen() -> Iterator[SeenIds]:
    ids = SeenIds()
    yield ids
    ids.close()


def results(ids: SeenIds, claims: list[Claim]) -> list[Duplicate]:
    return [seen.duplicate for seen in ids.check(claims)]


def claim(
    claim_id: str = "c", text: str = "t", evidence: str | None = None, gold: str | None = None
) -> Claim:
    return Claim(claim_id=claim_id, position=0, text=text, evidence=evidence, gold=gold)


def test_a_claim_is_new_once_and_repeated_ever_after(seen: SeenIds) -> None:
    assert results(seen, [claim(), claim("d"), claim()]) == [
        Duplicate.NEW,
        Duplicate.NEW,
        Duplicate.REPEATED,
    ]
    assert results(seen, [claim("d"), claim("e")]) == [Duplicate.REPEATED, Duplicate.NEW]


@pytest.mark.parametrize(
    ("other", "how"),
    [
        (claim(text="u", gold="A"), Duplicate.OTHER_TEXT),
        (claim(gold="SUPPORTS"), Duplicate.OTHER_LABEL),
        (claim(gold="None"), Duplicate.OTHER_LABEL),
    ],
    ids=["text", "gold", "gold 'None'"],
)
def test_the_same_id_with_other_content_is_contradicted(
    seen: SeenIds, other: Claim, how: Duplicate
) -> None:
    first = claim(gold="A")
    assert results(seen, [first, other, first, other]) == [
        Duplicate.NEW,
        how,
        Duplicate.REPEATED,
        how,
    ]


def test_a_missing_label_contradicts_none_and_the_first_label_is_reported_once(
    seen: SeenIds,
) -> None:
    golds = ["", "A", "", "A", "B"]
    assert results(seen, [claim(gold=gold or None) for gold in golds]) == [
        Duplicate.NEW,
        Duplicate.LABELLED,
        Duplicate.REPEATED,
        Duplicate.REPEATED,
        Duplicate.OTHER_LABEL,
    ]


def test_the_same_claim_with_other_evidence_has_an_id_of_its_own(seen: SeenIds) -> None:
    first, second, again, third = seen.check(
        [claim(), claim(evidence="e"), claim(evidence="e"), claim(evidence="f")]
    )
    assert [first[0], second[0], again[0], third[0]] == [
        Duplicate.NEW,
        Duplicate.OTHER_EVIDENCE,
        Duplicate.REPEATED,
        Duplicate.OTHER_EVIDENCE,
    ]
    assert first[1].claim_id == "c"
    own = second[1].claim_id
    assert re.fullmatch("c#[0-9a-f]{8}", own)
    assert again[1].claim_id == own
    assert third[1].claim_id not in ("c", own)


def test_an_id_made_for_other_evidence_stays_within_its_bound(seen: SeenIds) -> None:
    long = "i" * 256
    (_, first, _), (duplicate, second, _) = seen.check([claim(long), claim(long, evidence="e")])
    assert duplicate is Duplicate.OTHER_EVIDENCE
    assert len(second.claim_id) == len(first.claim_id) == 256


def test_another_label_for_the_same_evidence_is_contradicted(seen: SeenIds) -> None:
    claims = [claim(), claim(evidence="e", gold="A"), claim(evidence="e", gold="B")]
    assert results(seen, claims)[-1] is Duplicate.OTHER_LABEL


def test_where_a_claim_stands_is_not_its_content(seen: SeenIds) -> None:
    again = claim().model_copy(update={"position": 9})
    assert results(seen, [claim(), again]) == [Duplicate.NEW, Duplicate.REPEATED]


def test_nothing_to_look_at_gives_no_sighting(seen: SeenIds) -> None:
    assert seen.check([]) == []


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=20))
def test_sightings_are_those_of_a_dictionary(pairs: list[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    expected = []
    for claim_id, text in pairs:
        known = first.setdefault(claim_id, text)
        new = len(first) > len(expected) - sum(s is not Duplicate.NEW for s in expected)
        same = Duplicate.REPEATED if known == text else Duplicate.OTHER_TEXT
        expected.append(Duplicate.NEW if new else same)
    ids = SeenIds()
    assert results(ids, [claim(*pair) for pair in pairs]) == expected
    ids.close()


def test_a_label_that_the_prompt_does_not_know_is_compared_as_the_file_spells_it(
    seen: SeenIds,
) -> None:
    found = seen.check([claim()] * 3, ["half-true", "mostly-true", "half-true"])
    assert [one.duplicate for one in found] == [
        Duplicate.NEW,
        Duplicate.OTHER_LABEL,
        Duplicate.REPEATED,
    ]


def test_claims_that_are_equal_but_for_their_ids_are_counted(seen: SeenIds) -> None:
    labels = ["A", "B", "A", ""]
    assert {s.duplicate for s in seen.check([claim(i) for i in "abcd"], labels)} == {Duplicate.NEW}
    assert seen.same_contents() == (3, 1)
