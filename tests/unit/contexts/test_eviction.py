"""Which engines are evicted: the cheapest to lose, enough of them, and none needlessly."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contexts.eviction import Candidate, cheapest_to_lose

ENGINE = Candidate("ctx-b", memory_bytes=10, demand=0, start_seconds=20.0, idle_seconds=60.0)

candidates = st.lists(
    st.builds(
        Candidate,
        name=st.text("abc", min_size=1, max_size=4),
        memory_bytes=st.integers(0, 50),
        demand=st.integers(0, 3),
        start_seconds=st.floats(0, 300),
        idle_seconds=st.floats(0, 5_000),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.name,
)
missing = st.integers(1, 150)


def freed(chosen: object) -> int:
    return sum(candidate.memory_bytes for candidate in chosen)  # type: ignore[attr-defined]


@given(candidates, missing)
def test_enough_is_freed_or_all_of_them_go(engines: list[Candidate], bytes_: int) -> None:
    chosen = cheapest_to_lose(engines, bytes_)
    if freed(engines) >= bytes_:
        assert freed(chosen) >= bytes_
    else:
        assert sorted(c.name for c in chosen) == sorted(c.name for c in engines)


@given(candidates, missing)
def test_nobody_goes_whose_memory_is_not_needed(engines: list[Candidate], bytes_: int) -> None:
    chosen = cheapest_to_lose(engines, bytes_)
    if freed(engines) >= bytes_:
        assert all(freed(chosen) - candidate.memory_bytes < bytes_ for candidate in chosen)


@given(candidates, missing)
def test_a_dearer_one_never_goes_where_the_cheaper_suffice(
    engines: list[Candidate], bytes_: int
) -> None:
    chosen = cheapest_to_lose(engines, bytes_)
    dearest = max((candidate.loss_seconds for candidate in chosen), default=0.0)
    cheaper = [candidate for candidate in engines if candidate.loss_seconds < dearest]
    assert freed(cheaper) < bytes_


@given(candidates, missing, st.randoms())
def test_the_choice_does_not_hang_on_the_order_in_which_they_are_named(
    engines: list[Candidate], bytes_: int, random: object
) -> None:
    shuffled = list(engines)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert cheapest_to_lose(shuffled, bytes_) == cheapest_to_lose(engines, bytes_)


def test_nobody_goes_where_nothing_is_missing() -> None:
    assert list(cheapest_to_lose([ENGINE], 0)) == []


@pytest.mark.parametrize(
    "dearer",
    [
        replace(ENGINE, name="ctx-a", demand=1),
        replace(ENGINE, name="ctx-a", start_seconds=21.0),
        replace(ENGINE, name="ctx-a", idle_seconds=59.0),
    ],
    ids=["claims wait for it", "it takes longer to start", "it was used later"],
)
def test_what_makes_an_engine_dear_keeps_it(dearer: Candidate) -> None:
    assert list(cheapest_to_lose([dearer, ENGINE], 5)) == [ENGINE]


def test_one_that_is_wanted_is_as_dear_as_its_start_however_long_it_was_idle() -> None:
    assert replace(ENGINE, demand=1, idle_seconds=1e6).loss_seconds == ENGINE.start_seconds


def test_a_small_one_is_spared_where_a_large_one_has_to_go_anyway() -> None:
    small = replace(ENGINE, name="ctx-small", memory_bytes=2, start_seconds=1.0)
    large = replace(ENGINE, name="ctx-large", memory_bytes=10)
    assert list(cheapest_to_lose([small, large], 10)) == [large]
