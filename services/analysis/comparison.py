"""The comparison of runs over their common claims: scores, pairs, and ranks as sets."""

from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict

from services.analysis.calibration import Calibration, calibrate
from services.analysis.outcomes import AlignedRuns, LabelCodes, RunOutcomes, align
from services.analysis.pairs import Correction, Pair, compare_pairs, rank_sets
from services.analysis.scores import Scores, effective_clusters, majority, score
from services.contracts.errors import UsageError


class ComparedRun(BaseModel):
    """A run in the comparison. `scores` are over the common claims only."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    source: str | None
    prompt: str | None
    model: str | None
    adapter: str | None
    verdicts: int
    """All of the run's verdicts. Claims without a gold label, and those that are not common to all
    runs, are among them."""
    dead: int
    """Claims given up on; they are not among the common claims."""
    invalid: int
    """Verdicts INVALID on the common claims."""
    unknown_evidence: int
    """Verdicts for which the store does not say which evidence their claims had, so that these
    claims are in clusters by their ids alone."""
    rank: tuple[int, int]
    """The best and the worst rank that the pairs leave open."""
    scores: Scores
    calibration: Calibration | None = None
    """None if probabilities were not read, or there are too few claims."""


class GoldDifference(BaseModel):
    """Claims whose gold label differs between runs: by two labels, and how many."""

    model_config = ConfigDict(frozen=True)

    labels: tuple[str, str]
    claims: int


class Comparison(BaseModel):
    """Runs over the claims that have a verdict and the same gold label in each of them.

    `runs` are in the order of their accuracy, the best first; `pairs` name them by their index.
    """

    model_config = ConfigDict(frozen=True)

    claims: int
    clusters: int
    """Claims that share evidence or their id in the file are one cluster."""
    effective_clusters: float
    """The number of clusters of equal size that would say as much. With fewer than about 40, the
    intervals may be somewhat too short."""
    without_gold: int
    """Claims that have a verdict in each run, but no gold label in some run; left out."""
    gold_differs: tuple[GoldDifference, ...]
    """Claims that have a verdict in each run, but not the same gold label; left out."""
    majority_label: str
    majority: Scores
    """The baseline that answers the most frequent gold label to every claim."""
    correction: Correction
    runs: tuple[ComparedRun, ...]
    pairs: tuple[Pair, ...]


def compare_runs(
    outcomes: Iterable[RunOutcomes], codes: LabelCodes, correction: Correction = Correction.HOLM
) -> Comparison:
    """Compare runs, which were read with these codes. Give an iterator: then one run at a time is
    in memory whole.

    Raises UsageError if the runs have no common claim with a gold label.
    """
    aligned = align(outcomes)
    names = codes.names
    if aligned.gold.size == 0:
        raise UsageError(_why_none(aligned, names))

    def scores_of(given: np.ndarray[tuple[int], np.dtype[np.int16]]) -> Scores:
        return score(aligned.gold, given, len(names), aligned.cluster, aligned.clusters)

    scores = [scores_of(given) for given in aligned.given]
    order = sorted(range(len(scores)), key=lambda run: -scores[run].accuracy.value)
    pairs = compare_pairs(
        aligned.gold,
        [aligned.given[run] for run in order],
        aligned.cluster,
        aligned.clusters,
        correction,
    )
    ranks = rank_sets(len(order), pairs)
    most_frequent = majority(aligned.gold)
    return Comparison(
        claims=aligned.gold.size,
        clusters=aligned.clusters,
        effective_clusters=effective_clusters(np.bincount(aligned.cluster)),
        without_gold=aligned.without_gold,
        gold_differs=_gold_differences(aligned, names),
        majority_label=names[most_frequent],
        majority=scores_of(np.full_like(aligned.gold, most_frequent)),
        correction=correction,
        runs=tuple(
            _compared(aligned, run, rank, scores[run], names)
            for run, rank in zip(order, ranks, strict=True)
        ),
        pairs=pairs,
    )


def _compared(
    aligned: AlignedRuns,
    index: int,
    rank: tuple[int, int],
    scores: Scores,
    names: tuple[str, ...],
) -> ComparedRun:
    counts = aligned.counts[index]
    run = counts.known.run
    return ComparedRun(
        run_id=counts.known.run_id,
        source=run and run.source,
        prompt=run and run.prompt.name,
        model=run and run.context.model,
        adapter=run and run.context.adapter,
        verdicts=counts.verdicts,
        dead=counts.dead,
        invalid=int(np.count_nonzero(aligned.given[index] == 0)),
        unknown_evidence=counts.unknown_evidence,
        rank=rank,
        scores=scores,
        calibration=_calibration(aligned, index, names),
    )


def _calibration(aligned: AlignedRuns, index: int, names: tuple[str, ...]) -> Calibration | None:
    labels = aligned.counts[index].labels
    if not labels:
        return None
    columns = np.array([labels.index(name) if name in labels else -1 for name in names])
    gold = columns[aligned.gold]
    return calibrate(aligned.probabilities[index], gold, aligned.cluster, aligned.clusters)


def _gold_differences(aligned: AlignedRuns, names: tuple[str, ...]) -> tuple[GoldDifference, ...]:
    found = sorted(aligned.gold_differs, key=lambda each: -each[2])
    return tuple(GoldDifference(labels=(names[a], names[b]), claims=n) for a, b, n in found)


def _why_none(aligned: AlignedRuns, names: tuple[str, ...]) -> str:
    """No claim can be compared: why, and what to do."""
    if aligned.in_each == 0:
        counts = ", ".join(f"{each.known.run_id} {each.verdicts:,}" for each in aligned.counts)
        return (
            f"no claim (by id and text) has a verdict in every run; verdicts: {counts}. Name runs "
            "of the same claims; `keepwarm status` lists the runs and their files"
        )
    if differences := _gold_differences(aligned, names):
        listed = ", ".join(f"{' / '.join(each.labels)} {each.claims:,}" for each in differences[:5])
        return (
            f"the gold labels of the runs differ: {listed}. Give the labels the same names in all "
            "prompts, and other words or aliases (docs/prompts.md)"
        )
    return (
        "no claim that has a verdict in every run has a gold label in every run. Add labels to "
        "the file of claims, or their names to the prompts' labels, and run it again"
    )
