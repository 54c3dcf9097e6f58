"""Whether the intervals and tests of `keepwarm compare` hold what they say.

    .venv/bin/python benchmarks/intervals.py [--sets 4000] [--seed 1]

Draws sets of claims in clusters, with verdicts whose true scores are known, and counts how often a
95 % interval holds the truth, and how often the corrected tests find a difference between runs that
are equally good. Beside it the same intervals and tests for claims taken as independent. Prints
Markdown tables.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from services.analysis.outcomes import Clusters, Codes
from services.analysis.pairs import Correction, Pair, adjust, compare_pairs
from services.analysis.scores import expected_scores, score

LABELS = 4  # INVALID and three
_GOLD = np.array([0.0, 0.5, 0.3, 0.2])
# Of wrong verdicts: INVALID, the next label, the one after it.
_WRONG = np.array([0.05, 0.65, 0.3])


@dataclass(frozen=True)
class Design:
    """Sets of claims. A cluster has one claim and a geometric number of others.

    Each claim's verdict depends on a number drawn for its cluster with the probability
    `by_cluster`, else on one of its own; with the probability `by_run` that number is drawn for
    each run, else it is common to all runs. So verdicts in a cluster are alike, and so are those of
    different runs.
    """

    clusters: int
    size: float
    by_cluster: float
    by_run: float = 0.5


@dataclass(frozen=True)
class Drawn:
    gold: Codes
    given: tuple[Codes, ...]
    cluster: Clusters
    clusters: int


def draw(random: np.random.Generator, design: Design, recalls: Sequence[Sequence[float]]) -> Drawn:
    """Verdicts of runs; `recalls` has for each run the probability to be right by gold label."""
    sizes = random.geometric(1 / design.size, design.clusters)
    cluster = np.repeat(np.arange(design.clusters), sizes)
    claims = len(cluster)
    gold = random.choice(LABELS, claims, p=_GOLD).astype(np.int16)
    common_of_cluster, common = random.random(design.clusters), random.random(claims)
    given = []
    for recall in recalls:
        by_cluster = random.random(claims) < design.by_cluster
        by_run = random.random(claims) < design.by_run
        own_of_cluster, own = random.random(design.clusters), random.random(claims)
        chance = np.where(
            by_cluster,
            np.where(by_run, own_of_cluster[cluster], common_of_cluster[cluster]),
            np.where(by_run, own, common),
        )
        right = chance < np.asarray(recall)[gold - 1]
        kind = random.choice(3, claims, p=_WRONG)
        wrong = np.where(kind == 0, 0, (gold - 1 + kind) % 3 + 1)
        given.append(np.where(right, gold, wrong).astype(np.int16))
    return Drawn(gold, tuple(given), cluster, design.clusters)


def truth(recall: Sequence[float]) -> dict[str, float]:
    """The scores of infinitely many claims."""
    confusion = np.zeros((LABELS, LABELS))
    for gold in range(1, LABELS):
        right = recall[gold - 1]
        confusion[gold, gold] = _GOLD[gold] * right
        for kind, share in enumerate(_WRONG):
            label = 0 if kind == 0 else (gold - 1 + kind) % 3 + 1
            confusion[gold, label] += _GOLD[gold] * (1 - right) * share
    return expected_scores(confusion)


def coverage(
    sets: int, design: Design, recalls: Sequence[Sequence[float]], seed: int
) -> dict[str, tuple[float, float]]:
    """For each score of the first run, and the difference of accuracy of the first two: the share
    of sets whose interval holds the truth, with clusters and with claims taken as independent.
    """
    random = np.random.default_rng(seed)
    true = truth(recalls[0])
    difference = true["accuracy"] - truth(recalls[1])["accuracy"]
    held: Counter[tuple[str, bool]] = Counter()
    for _ in range(sets):
        drawn = draw(random, design, recalls[:2])
        for clustered in (True, False):
            cluster = drawn.cluster if clustered else np.arange(len(drawn.gold))
            clusters = drawn.clusters if clustered else len(drawn.gold)
            found = score(drawn.gold, drawn.given[0], LABELS, cluster, clusters)
            for name, value in true.items():
                low, high = getattr(found, name).interval
                held[name, clustered] += low <= value <= high
            (pair,) = compare_pairs(drawn.gold, drawn.given, cluster, clusters, Correction.HOLM)
            low, high = pair.interval
            held["difference", clustered] += low <= difference <= high
    return {
        name: (held[name, True] / sets, held[name, False] / sets) for name in (*true, "difference")
    }


def false_differences(
    sets: int, design: Design, recalls: Sequence[Sequence[float]], seed: int
) -> dict[str, float]:
    """The share of sets in which a difference is found between two runs that are equally good: with
    Holm's correction, without correction, and with Holm's of McNemar's test, which takes claims for
    independent.
    """
    random = np.random.default_rng(seed)
    accuracy = [round(truth(recall)["accuracy"], 12) for recall in recalls]
    found: Counter[str] = Counter()
    for _ in range(sets):
        drawn = draw(random, design, recalls)
        pairs = compare_pairs(
            drawn.gold, drawn.given, drawn.cluster, drawn.clusters, Correction.HOLM
        )
        independent = adjust([pair.mcnemar_p_value for pair in pairs], Correction.HOLM)

        def any_false(p_values: Sequence[float], pairs: Sequence[Pair] = pairs) -> bool:
            return any(
                p_value <= 0.05 and accuracy[pair.first] == accuracy[pair.second]
                for pair, p_value in zip(pairs, p_values, strict=True)
            )

        found["Holm"] += any_false([pair.adjusted_p_value for pair in pairs])
        found["no correction"] += any_false([pair.p_value for pair in pairs])
        found["McNemar and Holm"] += any_false(independent)
    return {name: found[name] / sets for name in ("Holm", "no correction", "McNemar and Holm")}


GOOD, FAIR, POOR = (0.9, 0.8, 0.7), (0.7, 0.6, 0.5), (0.4, 0.35, 0.3)
DESIGNS = {
    "1,200 claims, 300 clusters, alike": Design(300, 4, 0.7),
    "1,200 claims, 300 clusters, hardly alike": Design(300, 4, 0.2),
    "240 claims, 120 clusters, alike": Design(120, 2, 0.7),
    "1,000 claims, 50 clusters, alike": Design(50, 20, 0.5),
    "500 claims, each its own cluster": Design(500, 1, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sets", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    first = next(iter(DESIGNS.values()))
    print(
        "| claims | true accuracy | interval for "
        "| accuracy | balanced accuracy | macro-F1 | difference |"
    )
    print("|---|---|---|---:|---:|---:|---:|")
    for name, design in DESIGNS.items():
        for recall in (GOOD, FAIR, POOR) if design is first else (FAIR,):
            held = coverage(arguments.sets, design, [recall, FAIR], arguments.seed)
            for index, interval in enumerate(("clusters", "independent")):
                cells = [f"{100 * values[index]:.1f} %" for values in held.values()]
                true = f"{truth(recall)['accuracy']:.2f}"
                print(f"| {name} | {true} | {interval} | {' | '.join(cells)} |", flush=True)
    print()
    print("| runs | claims | Holm | no correction | McNemar and Holm |")
    print("|---|---|---:|---:|---:|")
    for runs, recalls in (
        ("6 equally good", [FAIR] * 6),
        ("3 equally good, 3 better", [FAIR] * 3 + [GOOD] * 3),
    ):
        for name in ("1,200 claims, 300 clusters, alike", "240 claims, 120 clusters, alike"):
            rates = false_differences(arguments.sets, DESIGNS[name], recalls, arguments.seed)
            cells = [f"{100 * rate:.1f} %" for rate in rates.values()]
            print(f"| {runs} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
