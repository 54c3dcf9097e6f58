"""Paired comparisons of runs: differences of accuracy, tests, and what they say about ranks."""

from collections.abc import Sequence
from enum import StrEnum
from math import sqrt

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import binom, binomtest, false_discovery_control, norm

from services.analysis.outcomes import Clusters, Codes
from services.analysis.scores import (
    CONFIDENCE,
    Floats,
    critical_value,
    independent_claims,
    standard_error,
)

LEVEL = 1 - CONFIDENCE
POWER = 0.8
# Up to this many clusters in which the two runs differ, the test's distribution is computed; above,
# it is the normal one to six digits.
_MAX_EXACT_CLUSTERS = 10_000


class Correction(StrEnum):
    """The correction of the p values of all pairs.

    Holm (1979) keeps the probability of any false difference under 5 %, whatever the dependence.
    Benjamini and Hochberg (1995) keep the expected share of false differences among those found
    under 5 %; that is proven for independent and positively dependent tests.
    """

    HOLM = "holm"
    BENJAMINI_HOCHBERG = "bh"


class Pair(BaseModel):
    """Two runs, by their index, on the same claims."""

    model_config = ConfigDict(frozen=True)

    first: int
    second: int
    difference: float
    """The accuracy of the first less that of the second."""
    interval: tuple[float, float] | None
    """95 %, of this pair alone; None with fewer than two clusters."""
    only_first_correct: int
    only_second_correct: int
    p_value: float
    """Of the hypothesis that neither is better, with whole clusters exchanged: `exchange_test`."""
    mcnemar_p_value: float
    """The exact test of McNemar (1947), which takes claims for independent."""
    adjusted_p_value: float
    """`p_value` corrected for the number of pairs."""
    detectable: float | None
    """The least true difference that would be found with a probability of 80 %."""


def compare_pairs(
    gold: Codes,
    given: Sequence[Codes],
    cluster: Clusters,
    clusters: int,
    correction: Correction,
) -> tuple[Pair, ...]:
    """Every pair of runs. `gold`, each of `given` and `cluster` have an entry for each claim."""
    correct = [codes == gold for codes in given]
    by_cluster = [np.bincount(cluster[hits], minlength=clusters) for hits in correct]
    sizes = np.bincount(cluster, minlength=clusters)
    indexes = [(a, b) for a in range(len(given)) for b in range(a + 1, len(given))]
    found = []
    for a, b in indexes:
        differences = by_cluster[a] - by_cluster[b]
        first = int(np.count_nonzero(correct[a] & ~correct[b]))
        second = int(np.count_nonzero(correct[b] & ~correct[a]))
        found.append((differences, first, second, exchange_test(differences)))
    adjusted = adjust([p_value for *_, p_value in found], correction)
    pairs = []
    for (a, b), (differences, first, second, p_value), corrected in zip(
        indexes, found, adjusted, strict=True
    ):
        difference = float(differences.sum() / len(gold))
        spread = _difference_interval(differences, sizes, first, second)
        pairs.append(
            Pair(
                first=a,
                second=b,
                difference=difference,
                interval=spread and spread[0],
                only_first_correct=first,
                only_second_correct=second,
                p_value=p_value,
                mcnemar_p_value=mcnemar(first, second),
                adjusted_p_value=corrected,
                detectable=spread and _detectable(spread[1], sizes, len(indexes)),
            )
        )
    return tuple(pairs)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test (1947), exact: the two-sided binomial test of the claims that one run alone
    has correct.
    """
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def exchange_test(differences: Clusters) -> float:
    """The two-sided p value of the hypothesis that, in every cluster, the verdicts of the two runs
    could as well be exchanged: the share of all exchanges of whole clusters that give a total
    difference at least as large. `differences` are correct claims of one run less those of the
    other, by cluster.

    If each cluster is one claim this is McNemar's exact test. A test by changes of sign is also
    valid for large samples if only the mean difference is 0 (Canay, Romano and Shaikh 2017).
    """
    sizes, clusters = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    total = abs(int(differences.sum()))
    if total == 0:
        return 1.0
    if clusters.sum() > _MAX_EXACT_CLUSTERS:
        return float(2 * norm.sf(total / sqrt(int((clusters * sizes**2).sum()))))
    # The distribution of the sum over clusters of the size or 0, each with probability 1/2.
    chances: Floats = np.ones(1)
    for size, number in zip(sizes.tolist(), clusters.tolist(), strict=True):
        of_size = np.zeros(size * number + 1)
        of_size[::size] = binom.pmf(np.arange(number + 1), number, 0.5)
        chances = np.convolve(chances, of_size).astype(np.float64)
    largest = len(chances) - 1
    return min(1.0, 2 * float(chances[(largest + total) // 2 :].sum()))


def _difference_interval(
    differences: Clusters, sizes: Clusters, only_first: int, only_second: int
) -> tuple[tuple[float, float], float] | None:
    """The 95 % interval of the difference of accuracy, and its standard error: Bonett and Price's
    adjusted interval (2012) for the number of independent claims that would have the cluster-robust
    standard error. It adds two claims, on which one run alone is correct, so it also holds if the
    runs hardly differ. None with fewer than two clusters.
    """
    if len(sizes) < 2:
        return None
    claims = int(sizes.sum())
    difference = float(differences.sum()) / claims
    error = standard_error((differences - difference * sizes) / claims, sizes)
    variance = (only_first + only_second) / claims - difference**2
    independent = independent_claims(variance, error, sizes)
    adjusted = independent + 2
    first = (independent * only_first / claims + 1) / adjusted
    second = (independent * only_second / claims + 1) / adjusted
    middle = first - second
    error = sqrt((first + second - middle**2) / adjusted)
    half = critical_value(sizes) * error
    return (max(-1.0, middle - half), min(1.0, middle + half)), error


def _detectable(error: float, sizes: Clusters, pairs: int) -> float:
    """At the level that the smallest of the p values must reach: 5 % divided by the pairs. For both
    corrections; it is an upper bound for the other pairs.
    """
    needed = critical_value(sizes, LEVEL / 2 / pairs) + critical_value(sizes, 1 - POWER)
    return min(1.0, needed * error)


def adjust(p_values: Sequence[float], correction: Correction) -> list[float]:
    """The p values corrected for their number: a difference is found if its value is at most 5 %.

    Holm's: the i-th smallest of m is multiplied by m - i + 1, and is no less than the one before.
    """
    if not p_values:
        return []
    if correction is Correction.BENJAMINI_HOCHBERG:
        return [float(value) for value in false_discovery_control(p_values, method="bh")]
    values: Floats = np.asarray(p_values)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def rank_sets(runs: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
    """The best and the worst rank that each run may have: one more than the runs that were found
    better, and the number of runs less those found worse.

    With Holm's correction all true ranks are in their sets with a probability of at least 95 %
    (Mogstad, Romano, Shaikh and Wilhelm 2024). With Benjamini and Hochberg's there is no such
    bound.
    """
    better, worse = [0] * runs, [0] * runs
    for pair in pairs:
        if pair.adjusted_p_value > LEVEL or pair.difference == 0:
            continue
        first_wins = pair.difference > 0
        winner, loser = (pair.first, pair.second) if first_wins else (pair.second, pair.first)
        better[loser] += 1
        worse[winner] += 1
    return [(1 + better[run], runs - worse[run]) for run in range(runs)]
