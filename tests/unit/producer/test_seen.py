from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Claim
from services.producer.seen import SeenIds, Sighting


@pytest.fixture
def seen() -> Iterator[SeenIds]:
    ids = SeenIds()
    yield ids
    ids.close()


def claim(
    claim_id: str = "c", text: str = "t", evidence: str | None = None, gold: str | None = None
) -> Claim:
    return Claim(claim_id=claim_id, position=0, text=text, evidence=evidence, gold=gold)


def test_a_claim_is_new_once_and_repeated_ever_after(seen: SeenIds) -> None:
    assert seen.look([claim(), claim("d"), claim()]) == [
        Sighting.NEW,
        Sighting.NEW,
        Sighting.REPEATED,
    ]
    assert seen.look([claim("d"), claim("e")]) == [Sighting.REPEATED, Sighting.NEW]


@pytest.mark.parametrize(
    "other",
    [
        claim(text="u"),
        claim(evidence="e"),
        claim(evidence="None"),
        claim(gold="SUPPORTS"),
        claim(gold="None"),
    ],
    ids=["text", "evidence", "evidence 'None'", "gold", "gold 'None'"],
)
def test_the_same_id_with_other_content_is_contradicted(seen: SeenIds, other: Claim) -> None:
    assert seen.look([claim(), other, claim(), other]) == [
        Sighting.NEW,
        Sighting.CONTRADICTED,
        Sighting.REPEATED,
        Sighting.CONTRADICTED,
    ]


def test_where_a_claim_stands_is_not_its_content(seen: SeenIds) -> None:
    again = claim().model_copy(update={"position": 9})
    assert seen.look([claim(), again]) == [Sighting.NEW, Sighting.REPEATED]


def test_nothing_to_look_at_gives_no_sighting(seen: SeenIds) -> None:
    assert seen.look([]) == []


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=20))
def test_sightings_are_those_of_a_dictionary(pairs: list[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    expected = []
    for claim_id, text in pairs:
        known = first.setdefault(claim_id, text)
        new = len(first) > len(expected) - sum(s is not Sighting.NEW for s in expected)
        same = Sighting.REPEATED if known == text else Sighting.CONTRADICTED
        expected.append(Sighting.NEW if new else same)
    ids = SeenIds()
    assert ids.look([claim(*pair) for pair in pairs]) == expected
    ids.close()
