import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from services.analysis.calibration import (
    best_temperature,
    calibrate,
    numbers_of,
    selection_part,
)

CLAIMS = 20_000


@pytest.fixture(scope="module")
def calibrated() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of three labels, and gold labels drawn by them."""
    random = np.random.default_rng(4)
    probabilities = softmax(random.normal(scale=1.5, size=(CLAIMS, 3)), axis=1)
    gold = (random.random((CLAIMS, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    return probabilities, gold.clip(max=2)


def own_clusters(gold: np.ndarray) -> tuple[np.ndarray, int]:
    return np.arange(len(gold)), len(gold)


def test_brier_score_and_likelihood_are_scikit_learns(calibrated) -> None:
    probabilities, gold = calibrated
    found = numbers_of(np.log(probabilities), gold)
    assert found.negative_log_likelihood == pytest.approx(log_loss(gold, probabilities))
    assert found.brier == pytest.approx(
        brier_score_loss(gold, probabilities, labels=[0, 1, 2], scale_by_half=False)
    )
    assert found.accuracy == (probabilities.argmax(axis=1) == gold).mean()


def test_the_calibration_error_is_the_mean_gap_of_its_bins() -> None:
    # Confidences of 0.9 (bin 14 of 15), right in one of two; 0.6 (bin 9), right in both.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    found = numbers_of(np.log(probabilities), np.array([0, 1, 0, 1]))
    assert found.ece == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)


def test_calibrated_probabilities_have_hardly_any_error(calibrated) -> None:
    probabilities, gold = calibrated
    found = calibrate(probabilities, gold, *own_clusters(gold))
    assert found is not None
    assert found.raw.ece < 0.02
    assert found.temperature == pytest.approx(1.0, abs=0.05)
    assert found.selection_claims + found.report_claims == CLAIMS
    assert found.left_out == 0


def test_temperature_scaling_undoes_confidence_that_is_too_high(calibrated) -> None:
    probabilities, gold = calibrated
    too_high = softmax(2.5 * np.log(probabilities), axis=1)
    found = calibrate(too_high, gold, *own_clusters(gold))
    assert found is not None
    assert found.temperature == pytest.approx(2.5, rel=0.05)
    assert found.raw.ece > 0.1 > 0.02 > found.scaled.ece
    assert found.scaled.accuracy == found.raw.accuracy


def test_the_best_temperature_has_the_least_loss_of_all(calibrated) -> None:
    probabilities, gold = calibrated
    logs = 0.5 * np.log(probabilities)
    best = best_temperature(logs, gold)
    losses = [log_loss(gold, softmax(logs / t, axis=1)) for t in (best, best * 1.05, best / 1.05)]
    assert losses[0] == min(losses)


def test_batch_calibration_undoes_a_preference_for_a_label(calibrated) -> None:
    probabilities, gold = calibrated
    biased = softmax(np.log(probabilities) + np.array([2.0, 0.0, 0.0]), axis=1)
    found = calibrate(biased, gold, *own_clusters(gold))
    assert found is not None
    assert found.batch.accuracy > found.raw.accuracy + 0.05
    assert found.batch.negative_log_likelihood < found.raw.negative_log_likelihood


def test_no_cluster_is_in_both_parts() -> None:
    random = np.random.default_rng(2)
    cluster = np.repeat(np.arange(500), random.integers(1, 30, 500))
    selected = selection_part(cluster, 500)
    shares = np.bincount(cluster, weights=selected) / np.bincount(cluster)
    assert set(shares) == {0.0, 1.0}
    assert selected.mean() == pytest.approx(0.5, abs=0.03)
    assert (selection_part(cluster, 500) == selected).all()


def test_claims_without_probabilities_or_gold_column_are_left_out(calibrated) -> None:
    probabilities, gold = calibrated
    probabilities, gold = probabilities.copy(), gold.copy()
    probabilities[:7] = np.nan
    gold[7:10] = -1
    found = calibrate(probabilities, gold, *own_clusters(gold))
    assert found is not None
    assert found.left_out == 10
    assert found.selection_claims + found.report_claims == CLAIMS - 10


def test_a_probability_that_is_stored_as_0_has_a_bounded_loss() -> None:
    probabilities = np.array([[1.0, 0.0]] * 10)
    found = calibrate(probabilities, np.array([1] * 10), np.arange(10), 10)
    assert found is not None
    assert found.raw.negative_log_likelihood == pytest.approx(-np.log(5e-7), rel=1e-3)


def test_one_cluster_cannot_be_divided() -> None:
    probabilities = np.array([[0.5, 0.5]] * 4)
    assert calibrate(probabilities, np.zeros(4, int), np.zeros(4, int), 1) is None
