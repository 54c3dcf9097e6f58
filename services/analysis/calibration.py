"""Whether label probabilities mean what they say, as stored and after two corrections.

The clusters are divided at random, with a fixed seed, into a selection and a report part, so that
claims that share evidence are in one part. What is fitted is fitted on the selection part. All
numbers are of the report part.
"""

from math import exp, log

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from services.analysis.outcomes import Clusters
from services.analysis.scores import Floats

BINS = 15
_SEED = 18
# Stored probabilities have six digits, so 0 is less than this.
_SMALLEST = 5e-7
_TEMPERATURES = (0.01, 100.0)


class CalibrationNumbers(BaseModel):
    """Of label probabilities: how good they are.

    `accuracy` is that of the most likely label. `ece` is the expected calibration error: the mean
    distance of accuracy and confidence (the probability of the most likely label) over 15 bins of
    equal width, weighted by their claims (Guo et al. 2017, arXiv:1706.04599). `brier` is the mean
    squared distance of the probabilities from 1 for the gold label and 0 for the others, summed
    over labels: 0 to 2 (Brier 1950). `negative_log_likelihood` is the mean of -ln of the gold
    label's probability; one that is stored as 0 counts as 5e-7.
    """

    model_config = ConfigDict(frozen=True)

    accuracy: float
    ece: float
    brier: float
    negative_log_likelihood: float


class Calibration(BaseModel):
    """A run's probabilities, on the same claims of the report part."""

    model_config = ConfigDict(frozen=True)

    selection_claims: int
    report_claims: int
    left_out: int
    """Claims without probabilities (INVALID), or whose gold label is not one of the run's."""
    raw: CalibrationNumbers
    """As stored."""
    batch: CalibrationNumbers
    """After batch calibration (Zhou et al. 2023, arXiv:2309.17249): each label's probability is
    divided by its mean over the claims of the report part, which needs no gold labels.
    """
    scaled: CalibrationNumbers
    """After temperature scaling (Guo et al. 2017)."""
    temperature: float
    """The one with the least negative log-likelihood on the selection part; over 1 if the model is
    too confident.
    """


def calibrate(
    probabilities: Floats, gold: npt.NDArray[np.integer], cluster: Clusters, clusters: int
) -> Calibration | None:
    """`probabilities` has a row for each claim and a column for each label, `gold` the column of
    its gold label, -1 if there is none. None if a part would have no claims.
    """
    is_usable = (gold >= 0) & ~np.isnan(probabilities).any(axis=1)
    selected = selection_part(cluster, clusters)[is_usable]
    probabilities, gold = probabilities[is_usable], gold[is_usable]
    if selected.all() or not selected.any():
        return None
    logs = np.log(np.maximum(probabilities, _SMALLEST))
    temperature = best_temperature(logs[selected], gold[selected])
    report, truth = logs[~selected], gold[~selected]
    prior = np.log(np.exp(report).mean(axis=0))
    return Calibration(
        selection_claims=int(selected.sum()),
        report_claims=len(truth),
        left_out=int(np.count_nonzero(~is_usable)),
        raw=numbers_of(log_softmax(report, axis=1), truth),
        batch=numbers_of(log_softmax(report - prior, axis=1), truth),
        scaled=numbers_of(log_softmax(report / temperature, axis=1), truth),
        temperature=temperature,
    )


def selection_part(cluster: Clusters, clusters: int) -> npt.NDArray[np.bool_]:
    """Which claims are in the selection part: whole clusters in a random order, up to about half of
    the claims.
    """
    order = np.random.default_rng(_SEED).permutation(clusters)
    sizes = np.bincount(cluster, minlength=clusters)
    is_selected = np.zeros(clusters, np.bool_)
    # The middle of each cluster, so that one that is more than half of all claims is in one part.
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    is_selected[order] = middles <= len(cluster) / 2
    return is_selected[cluster]


def best_temperature(logs: Floats, gold: npt.NDArray[np.integer]) -> float:
    """The temperature with the least negative log-likelihood, between 0.01 and 100."""

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logs / exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(gold)), gold].mean())

    low, high = _TEMPERATURES
    found = minimize_scalar(loss, bounds=(log(low), log(high)), method="bounded")
    return exp(float(found.x))


def numbers_of(logs: Floats, gold: npt.NDArray[np.integer]) -> CalibrationNumbers:
    """`logs` are log probabilities, a row for each claim."""
    probabilities = np.exp(logs)
    rows = np.arange(len(gold))
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == gold
    # Bins are open below and closed above, as in the source.
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    squares = np.square(probabilities).sum(axis=1)
    of_gold = probabilities[rows, gold]
    return CalibrationNumbers(
        accuracy=float(right.mean()),
        ece=float(np.abs(gaps).sum() / len(gold)),
        brier=float((squares - 2 * of_gold + 1).mean()),
        negative_log_likelihood=-float(logs[rows, gold].mean()),
    )
