import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from benchmarks.intervals import FAIR, GOOD, Design, coverage, draw
from services.analysis.scores import Scores, majority, score

# Codes: 0 is INVALID.
EDGES = {
    "one right": ([1, 2], [1, 3]),
    "all right": ([1, 1, 2, 3], [1, 1, 2, 3]),
    "all wrong": ([1, 1, 2, 3], [2, 3, 0, 1]),
    "all INVALID": ([1, 2, 1], [0, 0, 0]),
    "a verdict that is no gold label": ([1, 1, 2, 2], [1, 3, 2, 3]),
    "one gold label": ([2, 2, 2], [2, 1, 2]),
}


def independent(gold: np.ndarray, given: np.ndarray) -> Scores:
    return score(gold, given, 4, np.arange(len(gold)), len(gold))


@pytest.fixture(scope="module")
def drawn():
    return draw(np.random.default_rng(3), Design(300, 4, 0.7), [GOOD, FAIR])


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_scikit_learns_at_every_edge(case: str) -> None:
    gold, given = (np.array(codes, np.int16) for codes in EDGES[case])
    found = independent(gold, given)
    occurring = sorted(set(gold.tolist()))
    expected = (
        accuracy_score(gold, given),
        balanced_accuracy_score(gold, given),
        f1_score(gold, given, labels=occurring, average="macro", zero_division=0),
    )
    values = [found.accuracy.value, found.balanced_accuracy.value, found.macro_f1.value]
    assert values == pytest.approx(expected, abs=1e-12)
    for estimate in (found.accuracy, found.balanced_accuracy, found.macro_f1):
        assert estimate.interval is not None
        low, high = estimate.interval
        assert 0 <= low <= estimate.value <= high <= 1
        assert low < high


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_of_many_claims_are_scikit_learns(drawn) -> None:
    gold, given = drawn.gold, drawn.given[0]
    found = score(gold, given, 4, drawn.cluster, drawn.clusters)
    assert found.accuracy.value == pytest.approx(accuracy_score(gold, given))
    assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(gold, given))
    f1 = f1_score(gold, given, labels=[1, 2, 3], average="macro")
    assert found.macro_f1.value == pytest.approx(f1)


def test_standard_errors_are_those_of_a_bootstrap_that_draws_clusters(drawn) -> None:
    found = score(drawn.gold, drawn.given[0], 4, drawn.cluster, drawn.clusters)
    random = np.random.default_rng(1)
    rows = [np.flatnonzero(drawn.cluster == number) for number in range(drawn.clusters)]
    repeated = []
    for _ in range(2_000):
        chosen = np.concatenate([rows[n] for n in random.integers(0, len(rows), len(rows))])
        again = independent(drawn.gold[chosen], drawn.given[0][chosen])
        repeated.append([again.accuracy.value, again.balanced_accuracy.value, again.macro_f1.value])
    errors = [
        found.accuracy.standard_error,
        found.balanced_accuracy.standard_error,
        found.macro_f1.standard_error,
    ]
    assert errors == pytest.approx(np.std(repeated, axis=0), rel=0.07)


def test_with_clusters_of_one_claim_the_interval_of_accuracy_is_wilsons() -> None:
    gold = np.ones(4_000, np.int16)
    given = np.where(np.arange(4_000) < 2_900, 1, 2).astype(np.int16)
    wilson = binomtest(2_900, 4_000).proportion_ci(0.95, method="wilson")
    interval = independent(gold, given).accuracy.interval
    assert interval == pytest.approx((wilson.low, wilson.high), abs=2e-5)


def test_where_all_claims_are_right_a_cluster_counts_as_one_claim() -> None:
    gold = np.ones(400, np.int16)
    interval = score(gold, gold, 2, np.arange(400) // 4, 100).accuracy.interval
    wilson = binomtest(100, 100).proportion_ci(0.95, method="wilson")
    assert interval == pytest.approx((wilson.low, 1.0), abs=2e-3)


def test_one_cluster_has_no_interval() -> None:
    gold = np.array([1, 2, 1], np.int16)
    accuracy = score(gold, gold, 3, np.zeros(3, np.int64), 1).accuracy
    assert (accuracy.value, accuracy.standard_error, accuracy.interval) == (1.0, None, None)


def test_the_majority_is_the_most_frequent_gold_label() -> None:
    assert majority(np.array([3, 1, 3, 2], np.int16)) == 3


def test_intervals_hold_the_truth_in_95_percent_of_clustered_sets() -> None:
    """As `benchmarks/intervals.py`, which draws more sets and more kinds of them."""
    held = coverage(2_000, Design(300, 4, 0.7), [GOOD, FAIR], seed=1)
    for name, (clustered, as_independent) in held.items():
        assert 0.94 <= clustered <= 0.96, name
        assert as_independent < 0.90, name
