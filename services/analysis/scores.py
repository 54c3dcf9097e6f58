"""Accuracy, balanced accuracy and macro-F1, with 95 % intervals for claims in clusters.

Claims that share evidence are not independent, so an interval that takes them for independent is
too short. Here the clusters are what was sampled. Each score is a function of the confusion matrix;
its standard error is that of the sum over clusters of its linear approximation (Woodruff 1971), the
cluster-robust "sandwich" estimator (Liang and Zeger 1986; for evaluations: Miller 2024,
arXiv:2411.00640). Few and unequal clusters are corrected for in the estimator (CR2 of Bell and
McCaffrey 2002) and in the degrees of freedom of Student's t (the effective number of clusters of
Carter, Schnepel and Steigerwald 2017, less 1). It needs no random numbers, and agrees with the
bootstrap that draws clusters.
"""

from collections.abc import Iterator
from math import sqrt

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy.special import stdtrit

from services.analysis.outcomes import Clusters, Codes

CONFIDENCE = 0.95
# Of a score of up to 10**10 claims; less is rounding.
_NO_ERROR = 1e-12

Floats = npt.NDArray[np.float64]


class Estimate(BaseModel):
    """A score, its standard error and its 95 % interval; None with fewer than two clusters."""

    model_config = ConfigDict(frozen=True)

    value: float
    standard_error: float | None
    interval: tuple[float, float] | None


class Scores(BaseModel):
    """Over claims with a gold label and a verdict. A verdict INVALID counts as wrong.

    `balanced_accuracy` is the mean recall of the gold labels that occur, and `macro_f1` the mean of
    their F1: as scikit-learn's `balanced_accuracy_score`, and its `f1_score` with these labels.
    """

    model_config = ConfigDict(frozen=True)

    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate


def score(gold: Codes, given: Codes, labels: int, cluster: Clusters, clusters: int) -> Scores:
    """The scores of a run. `gold`, `given` and `cluster` have an entry for each claim, at least
    one; codes are less than `labels`, clusters less than `clusters`.
    """
    cell = gold.astype(np.int64) * labels + given
    confusion = np.bincount(cell, minlength=labels**2).reshape(labels, labels)
    sizes = np.bincount(cluster, minlength=clusters)
    estimates = {}
    for name, value, effect in _linear(confusion.astype(np.float64)):
        effects = effect.ravel()[cell]
        sums: Floats = np.bincount(cluster, weights=effects, minlength=clusters).astype(np.float64)
        estimates[name] = _estimate(value, sums, sizes)
    return Scores(**estimates)


def expected_scores(confusion: Floats) -> dict[str, float]:
    """The scores of a confusion matrix by label code; rows are gold labels, columns verdicts."""
    return {name: value for name, value, _ in _linear(confusion)}


def standard_error(sums: Floats, sizes: Clusters) -> float:
    """Of an estimate whose linear approximation has these sums by cluster, which add up to 0.
    `sizes` are the claims of each cluster, at least two clusters.
    """
    return sqrt(float((np.square(sums) / (1 - sizes / sizes.sum())).sum()))


def effective_clusters(sizes: Clusters) -> float:
    """The number of equal clusters that would say as much."""
    return float(sizes.sum()) ** 2 / float(np.square(sizes, dtype=np.float64).sum())


def critical_value(sizes: Clusters, tail: float = (1 - CONFIDENCE) / 2) -> float:
    """Student's t that is exceeded with the probability `tail`."""
    return float(stdtrit(max(1.0, effective_clusters(sizes) - 1), 1 - tail))


def _linear(confusion: Floats) -> Iterator[tuple[str, float, Floats]]:
    """Each score, and by gold label and verdict the effect of one such claim on it: its derivative
    by that cell of the confusion matrix. The effects of all claims add up to 0.
    """
    right = np.diag(confusion)
    golds, givens = confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = golds > 0
    labels = np.count_nonzero(occurs)
    hit = np.eye(len(confusion))

    accuracy = right.sum() / confusion.sum()
    yield "accuracy", float(accuracy), (hit - accuracy) / confusion.sum()

    weight = _ratio(occurs, labels * golds)
    recall = _ratio(right, golds)
    effect = weight[:, None] * (hit - recall[:, None])
    yield "balanced_accuracy", float(recall[occurs].mean()), effect

    weight = _ratio(occurs, labels * (golds + givens))
    f1 = _ratio(2 * right, golds + givens)
    loss = weight * f1
    effect = 2 * hit * weight[:, None] - loss[:, None] - loss[None, :]
    yield "macro_f1", float(f1[occurs].mean()), effect


def _ratio(above: npt.NDArray[np.generic], below: Floats) -> Floats:
    """0 where `below` is 0."""
    ratio: Floats = np.zeros(len(below))
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


def _estimate(value: float, sums: Floats, sizes: Clusters) -> Estimate:
    if len(sizes) < 2:
        return Estimate(value=value, standard_error=None, interval=None)
    error = standard_error(sums, sizes)
    return Estimate(value=value, standard_error=error, interval=_interval(value, error, sizes))


def _interval(value: float, error: float, sizes: Clusters) -> tuple[float, float]:
    """Wilson's interval (1927) for the number of independent claims that would have this standard
    error (Korn and Graubard 1998; compared with others by Dean and Pagano 2015).
    """
    independent = independent_claims(value * (1 - value), error, sizes)
    z = critical_value(sizes)
    middle = value + z**2 / (2 * independent)
    half = z * sqrt(value * (1 - value) / independent + z**2 / (4 * independent**2))
    scale = 1 + z**2 / independent
    # At 0 and 1 a bound is the value itself, but for rounding.
    low, high = min(value, (middle - half) / scale), max(value, (middle + half) / scale)
    return max(0.0, low), min(1.0, high)


def independent_claims(variance: float, error: float, sizes: Clusters) -> float:
    """The number of independent claims, each with this variance, whose mean has this standard
    error. Where nothing varies, as when all claims are correct, a cluster counts as one claim.
    """
    return variance / error**2 if error > _NO_ERROR else effective_clusters(sizes)


def majority(gold: Codes) -> int:
    """The most frequent gold label: the baseline answers it to every claim."""
    return int(np.bincount(gold).argmax())
