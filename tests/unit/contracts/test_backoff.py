import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.backoff import backoff_seconds

SECONDS = st.floats(min_value=0.001, max_value=1_000)


@pytest.fixture(autouse=True)
def _known_random_numbers() -> Iterator[None]:
    state = random.getstate()
    random.seed(7)
    yield
    random.setstate(state)


@given(failures=st.integers(-3, 10**6), first=SECONDS, longest=SECONDS)
def test_a_pause_is_never_longer_than_it_may_be_and_never_shorter_than_half_its_bound(
    failures: int, first: float, longest: float
) -> None:
    bound = min(longest, first * 2.0 ** min(max(failures, 1) - 1, 32))
    pause = backoff_seconds(failures, first_seconds=first, longest_seconds=longest)
    assert bound / 2 <= pause <= bound


@given(failures=st.integers(1, 20), first=SECONDS)
def test_every_pause_is_at_least_as_long_as_any_before_it_until_the_longest(
    failures: int, first: float
) -> None:
    def pause(number: int) -> float:
        return backoff_seconds(number, first_seconds=first, longest_seconds=float("inf"))

    assert pause(failures) <= pause(failures + 1)


def test_the_bound_doubles_with_each_failure_up_to_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random, "uniform", lambda _, highest: highest)
    pauses = [backoff_seconds(n, first_seconds=0.5, longest_seconds=6) for n in range(1, 8)]
    assert pauses == [0.5, 1, 2, 4, 6, 6, 6]


def test_those_who_failed_together_do_not_come_back_together() -> None:
    pauses = [backoff_seconds(5, first_seconds=1, longest_seconds=30) for _ in range(200)]
    assert len(set(pauses)) > 100
    assert min(pauses) < 10 < 14 < max(pauses)


def test_no_pause_is_no_pause() -> None:
    assert backoff_seconds(1_000_000, first_seconds=2, longest_seconds=0) == 0
