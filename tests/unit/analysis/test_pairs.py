from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.intervals import FAIR, GOOD, Design, false_differences
from services.analysis.pairs import (
    Correction,
    Pair,
    adjust,
    compare_pairs,
    exchange_test,
    mcnemar,
    rank_sets,
)

HOLM, BH = Correction.HOLM, Correction.BENJAMINI_HOCHBERG


def by_enumeration(differences: list[int]) -> float:
    """The share of all changes of sign whose sum is at least as far from 0."""
    sums = [
        abs(sum(sign * each for sign, each in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return sum(each >= abs(sum(differences)) for each in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [[1], [1, 1, 1, 1, 1], [2, -1, 0, 3], [5, 1, 1, 1, -2, 0, 0, 4], [1, -1], [3, 3, 2, 2, 1, -1]],
)
def test_the_test_counts_every_exchange_of_clusters(differences: list[int]) -> None:
    found = exchange_test(np.array(differences))
    assert found == pytest.approx(by_enumeration(differences), abs=1e-12)
    assert exchange_test(-np.array(differences)) == found


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (20, 8), (300, 240)])
def test_with_clusters_of_one_claim_the_test_is_mcnemars(first: int, second: int) -> None:
    differences = np.array([1] * first + [-1] * second + [0] * 50)
    assert exchange_test(differences) == pytest.approx(mcnemar(first, second), abs=1e-12)
    if first + second:
        assert mcnemar(first, second) == binomtest(first, first + second).pvalue


def test_the_test_of_many_clusters_joins_the_exact_one() -> None:
    half = np.array([1, 1, 2, -1, -1, -2] * 833)
    exact = np.concatenate([half, np.ones(100, int)])
    normal = np.concatenate([half, half, half, np.ones(173, int)])
    assert exchange_test(normal) == pytest.approx(exchange_test(exact), rel=0.05)


def test_whole_clusters_are_less_evidence_than_as_many_claims() -> None:
    gold = np.ones(40, np.int16)
    wrong = np.where(np.arange(40) < 10, 2, 1).astype(np.int16)
    cluster = np.arange(40) // 5
    (pair,) = compare_pairs(gold, [gold, wrong], cluster, 8, HOLM)
    assert (pair.only_first_correct, pair.only_second_correct) == (10, 0)
    assert pair.mcnemar_p_value == pytest.approx(2 / 2**10)
    assert pair.p_value == pytest.approx(2 / 2**2)


def test_the_interval_of_runs_that_agree_on_every_claim_is_not_empty() -> None:
    gold = np.ones(100, np.int16)
    (pair,) = compare_pairs(gold, [gold, gold], np.arange(100), 100, HOLM)
    assert (pair.difference, pair.p_value) == (0.0, 1.0)
    # Bonett and Price: two claims more, on which one run alone is right.
    half = 1.9842 * (2 / 102**2) ** 0.5
    assert pair.interval == pytest.approx((-half, half), abs=1e-4)


def test_one_cluster_has_no_interval() -> None:
    gold = np.ones(3, np.int16)
    given = np.array([1, 2, 1], np.int16)
    (pair,) = compare_pairs(gold, [gold, given], np.zeros(3, np.int64), 1, HOLM)
    assert (pair.interval, pair.detectable, pair.p_value) == (None, None, 1.0)


def test_a_difference_as_large_as_the_detectable_one_is_found_in_about_80_percent_of_sets() -> None:
    random = np.random.default_rng(5)
    claims, only_first, only_second = 400, 0.154, 0.086
    gold = np.ones(claims, np.int16)
    cluster = np.arange(claims)
    found, detectable = [], []
    for _ in range(600):
        kind = random.choice(3, claims, p=[only_first, only_second, 1 - only_first - only_second])
        first = np.where(kind == 1, 2, 1).astype(np.int16)
        second = np.where(kind == 0, 2, 1).astype(np.int16)
        (pair,) = compare_pairs(gold, [first, second], cluster, claims, HOLM)
        found.append(pair.p_value <= 0.05)
        detectable.append(pair.detectable)
    assert np.mean(detectable) == pytest.approx(only_first - only_second, abs=0.002)
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_holms_values_are_those_of_its_steps() -> None:
    assert adjust([0.01, 0.04, 0.03, 0.005], HOLM) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust([0.9, 0.8], HOLM) == [1.0, 1.0]
    assert adjust([], HOLM) == adjust([], BH) == []


def test_benjamini_and_hochbergs_values_are_those_of_its_steps() -> None:
    assert adjust([0.01, 0.04, 0.03, 0.005], BH) == pytest.approx([0.02, 0.04, 0.04, 0.02])


def pair(first: int, second: int, difference: float, p_value: float) -> Pair:
    return Pair(
        first=first,
        second=second,
        difference=difference,
        interval=None,
        only_first_correct=0,
        only_second_correct=0,
        p_value=p_value,
        mcnemar_p_value=p_value,
        adjusted_p_value=p_value,
        detectable=None,
    )


def test_ranks_are_what_the_found_differences_leave_open() -> None:
    noise = [pair(0, 1, 0.02, 0.4), pair(0, 2, 0.1, 0.2), pair(1, 2, 0.08, 0.3)]
    assert rank_sets(3, noise) == [(1, 3), (1, 3), (1, 3)]
    last = [pair(0, 1, 0.02, 0.4), pair(0, 2, 0.1, 0.01), pair(1, 2, 0.08, 0.04)]
    assert rank_sets(3, last) == [(1, 2), (1, 2), (3, 3)]
    reverse = [pair(0, 1, -0.2, 0.01)]
    assert rank_sets(2, reverse) == [(2, 2), (1, 1)]
    assert rank_sets(1, []) == [(1, 1)]


def test_holm_keeps_false_differences_under_5_percent_in_clustered_sets() -> None:
    """As `benchmarks/intervals.py`, which draws more sets and more kinds of them."""
    recalls = [FAIR] * 3 + [GOOD]
    rates = false_differences(1_000, Design(150, 4, 0.7), recalls, seed=1)
    assert rates["Holm"] <= 0.055
    assert rates["no correction"] > 0.08
    assert rates["McNemar and Holm"] > 0.08
