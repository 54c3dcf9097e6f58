from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.producer.source import Record, sample_records


def records(count: int) -> Iterator[Record]:
    return (Record(line=i + 1, position=i, content=b"") for i in range(count))


def positions(total: int, limit: int | None, seed: int | None) -> list[int]:
    return [record.position for record in sample_records(records(total), total, limit, seed)]


@pytest.mark.parametrize(
    ("total", "limit", "expected"),
    [(5, None, [0, 1, 2, 3, 4]), (5, 2, [0, 1]), (5, 5, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2])],
)
def test_without_a_seed_the_first_lines_are_taken(
    total: int, limit: int | None, expected: list[int]
) -> None:
    assert positions(total, limit, None) == expected


def test_records_after_the_last_wanted_one_are_not_read() -> None:
    source = records(1_000)
    assert len(list(sample_records(source, 1_000, 3, None))) == 3
    assert next(source).position <= 4


@given(st.integers(1, 200), st.integers(1, 250), st.integers())
def test_a_sample_has_its_size_and_the_files_order(total: int, limit: int, seed: int) -> None:
    sample = positions(total, limit, seed)
    assert len(sample) == min(total, limit)
    assert sample == sorted(set(sample))


def test_the_same_seed_draws_the_same_sample() -> None:
    assert positions(1_000, 50, 7) == positions(1_000, 50, 7)
    assert positions(1_000, 50, 7) != positions(1_000, 50, 8)


def test_a_seed_of_zero_draws_a_sample_and_not_the_head() -> None:
    assert positions(1_000, 50, 0) != list(range(50))


def test_every_line_is_as_likely_as_every_other() -> None:
    draws, total, limit = 4_000, 20, 5
    counts = Counter(p for seed in range(draws) for p in positions(total, limit, seed))
    expected = draws * limit / total
    chi_square = sum((counts[p] - expected) ** 2 / expected for p in range(total))
    # 19 degrees of freedom; sampling without replacement only makes it smaller. P(> 43.8) = 0.001.
    assert chi_square < 43.8
