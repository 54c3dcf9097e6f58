"""The verdicts of runs as arrays, aligned by claim, and the clusters of claims that share evidence.

A claim takes 29 bytes in memory, and 8 bytes for each label if probabilities are read: 10 million
claims are 290 MB, twice that while they are sorted.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sqlalchemy import func, select

from services.contracts import INVALID
from services.contracts.claims import id_in_file
from services.store import KnownRun, Store
from services.store.schema import is_dead, outcomes

_CHUNK_ROWS = 10_000

Codes = npt.NDArray[np.int16]
"""Labels as `LabelCodes` numbers them; `NO_GOLD` where there is none."""
Clusters = npt.NDArray[np.int64]

NO_GOLD = -1


class LabelCodes:
    """Numbers for label names, the same ones for all runs that are compared. INVALID is 0."""

    def __init__(self) -> None:
        self._codes = {INVALID: 0}

    def code(self, label: str | None) -> int:
        return NO_GOLD if label is None else self._codes.setdefault(label, len(self._codes))

    @property
    def names(self) -> tuple[str, ...]:
        """The label names, by code."""
        return tuple(self._codes)


@dataclass(frozen=True)
class RunOutcomes:
    """The verdicts of a run. Dead claims, and claims without an outcome yet, are not among them.

    `verdicts` has a row for each verdict, sorted by `claim`, with the fields

    - `claim` (uint64): the digest of the claim's id and text. Of two claims of 10 million that
      share a digest (a probability of 3e-6) only the first is kept;
    - `file_id` (uint64): the digest of the id that the claim has in its file, without the mark by
      which the producer tells claims with one id and different evidence apart;
    - `evidence` (int64): the evidence's number; equal evidence has equal numbers;
    - `evidence_known` (bool): False if the store has no number for its evidence;
    - `gold`, `label` (int16): codes; `gold` may be `NO_GOLD`;
    - `probabilities` (float64, one for each of the run's labels; NaN if none), if they were read.
    """

    known: KnownRun
    verdicts: npt.NDArray[np.void]
    dead: int
    labels: tuple[str, ...]
    """The order of `probabilities`; empty if they were not read."""

    @property
    def unknown_evidence(self) -> int:
        """The number of verdicts whose evidence is not known, of claims that had evidence. An
        older Keepwarm stored them, or an older producer sent their claims.
        """
        found = self.known.input
        without = self.verdicts.size - int(self.verdicts["evidence_known"].sum())
        none = 0 if found is None else sum(count for _, count in found.without_evidence)
        return 0 if found is None else max(0, without - none)


def read_outcomes(
    store: Store, known: KnownRun, codes: LabelCodes, *, probabilities: bool = False
) -> RunOutcomes:
    """The verdicts of a run; reads them once, in chunks."""
    of_run = outcomes.c.run_key == known.run_key
    names = ["claim_id", "claim", "evidence_number", "gold", "label"]
    if probabilities:
        names.append("probabilities")
    query = select(*(outcomes.c[name] for name in names)).where(
        of_run, outcomes.c.label.is_not(None)
    )
    count_dead = select(func.count()).select_from(outcomes).where(of_run, is_dead)
    # As in an export: only such a file has ids with the mark.
    has_marks = known.input is not None and known.input.own_ids > 0
    with store.transaction() as connection:
        dead = connection.execute(count_dead).scalar_one()
        labels = known.run.prompt.label_names if known.run else ()
        if probabilities and not labels:  # not announced yet
            scored = outcomes.c.probabilities
            first = select(scored).where(of_run, scored.is_not(None)).limit(1)
            labels = tuple(json.loads(connection.execute(first).scalar() or "{}"))
        no_probabilities = (float("nan"),) * len(labels)

        def rows() -> Iterator[tuple[object, ...]]:
            found = connection.execute(query.execution_options(yield_per=_CHUNK_ROWS))
            for claim_id, text, evidence, gold, label, *scores in found:
                file_id = _digest(id_in_file(claim_id) if has_marks else claim_id)
                row = (
                    _digest(f"{claim_id}\0{text}"),
                    file_id,
                    # Without evidence: a cluster of this id only.
                    evidence if evidence is not None else file_id - 2**63,
                    evidence is not None,
                    codes.code(gold),
                    codes.code(label),
                )
                if not probabilities:
                    yield row
                elif scores[0] is None:
                    yield (*row, no_probabilities)
                else:
                    by_label = json.loads(scores[0])
                    yield (*row, tuple(by_label.get(name, 0.0) for name in labels))

        fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = [
            ("claim", "u8"),
            ("file_id", "u8"),
            ("evidence", "i8"),
            ("evidence_known", "?"),
            ("gold", "i2"),
            ("label", "i2"),
        ]
        if probabilities:
            fields.append(("probabilities", "f8", (len(labels),)))
        verdicts = np.fromiter(rows(), dtype=np.dtype(fields))
    _, first_rows = np.unique(verdicts["claim"], return_index=True)
    return RunOutcomes(known, verdicts[first_rows], dead, labels if probabilities else ())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class RunCounts:
    """The claims of one run."""

    known: KnownRun
    verdicts: int
    dead: int
    unknown_evidence: int
    labels: tuple[str, ...]
    """The columns of its probabilities, if they were read."""


@dataclass(frozen=True)
class AlignedRuns:
    """The common claims of several runs: those that have a verdict in each run, and in each the
    same gold label. Claims are the same if id and text are.

    `gold` has a code for each claim, `given[r]` the labels of run `r`, and `probabilities[r]` a row
    for each claim, if they were read. `cluster` numbers the clusters from 0: claims are in one
    cluster if they share evidence in any of the runs, or the id in the file, directly or through
    other claims.
    """

    counts: tuple[RunCounts, ...]
    gold: Codes
    given: tuple[Codes, ...]
    probabilities: tuple[npt.NDArray[np.float64], ...]
    cluster: Clusters
    clusters: int
    in_each: int
    """Claims with a verdict in each run, with gold labels or without."""
    without_gold: int
    """Of these, the claims without a gold label in at least one run."""
    gold_differs: tuple[tuple[int, int, int], ...]
    """Of the claims with gold labels, those whose labels differ: two codes and the number."""


def align(runs: Iterable[RunOutcomes]) -> AlignedRuns:
    """The common claims of the runs, of which one at a time is kept in memory whole."""
    counts: list[RunCounts] = []
    claim = np.empty(0, np.uint64)
    file_id = np.empty(0, np.uint64)
    gold = np.empty(0, np.int16)
    given: list[Codes] = []
    probabilities: list[npt.NDArray[np.float64]] = []
    evidence: list[npt.NDArray[np.int64]] = []
    other_gold = np.empty(0, np.int16)
    for run in runs:
        new = run.verdicts
        counts.append(RunCounts(run.known, len(new), run.dead, run.unknown_evidence, run.labels))
        if len(counts) == 1:
            claim, file_id, gold = new["claim"].copy(), new["file_id"].copy(), new["gold"].copy()
            other_gold = np.full_like(gold, NO_GOLD)
        else:
            _, old_rows, new_rows = np.intersect1d(
                claim, new["claim"], assume_unique=True, return_indices=True
            )
            claim, file_id, gold = claim[old_rows], file_id[old_rows], gold[old_rows]
            given = [codes[old_rows] for codes in given]
            probabilities = [scores[old_rows] for scores in probabilities]
            evidence = [numbers[old_rows] for numbers in evidence]
            new = new[new_rows]
            differ = (gold >= 0) & (new["gold"] >= 0) & (gold != new["gold"])
            other_gold = np.where(differ, new["gold"], other_gold[old_rows])
            gold[new["gold"] == NO_GOLD] = NO_GOLD
        given.append(new["label"].copy())
        if run.labels:
            probabilities.append(new["probabilities"].copy())
        if not evidence or not np.array_equal(evidence[-1], new["evidence"]):
            evidence.append(new["evidence"].copy())
    differ = (gold >= 0) & (other_gold >= 0)
    is_common = (gold >= 0) & ~differ
    labels, numbers = np.unique(
        np.column_stack([gold[differ], other_gold[differ]]), axis=0, return_counts=True
    )
    differences = zip(labels.tolist(), numbers.tolist(), strict=True)
    cluster = cluster_claims(file_id[is_common], [numbers[is_common] for numbers in evidence])
    return AlignedRuns(
        counts=tuple(counts),
        gold=gold[is_common],
        given=tuple(codes[is_common] for codes in given),
        probabilities=tuple(scores[is_common] for scores in probabilities),
        cluster=cluster,
        clusters=int(cluster.max(initial=-1)) + 1,
        in_each=len(gold),
        without_gold=int(np.count_nonzero(gold == NO_GOLD)),
        gold_differs=tuple((*labels, number) for labels, number in differences),
    )


def cluster_claims(
    file_id: npt.NDArray[np.uint64], evidence: Iterable[npt.NDArray[np.int64]]
) -> Clusters:
    """The number of each claim's cluster: the connected components of the graph in which each claim
    joins its id in the file and its evidence in each of the runs.
    """
    if len(file_id) == 0:
        return np.empty(0, np.int64)
    ids, id_of = np.unique(file_id, return_inverse=True)
    nodes, ends = len(ids), []
    for numbers in evidence:
        different, evidence_of = np.unique(numbers, return_inverse=True)
        ends.append(evidence_of + nodes)
        nodes += len(different)
    starts = np.tile(id_of, len(ends))
    edges = (np.ones(len(starts), np.bool_), (starts, np.concatenate(ends)))
    _, component = connected_components(coo_array(edges, shape=(nodes, nodes)), directed=False)
    _, cluster = np.unique(component[id_of], return_inverse=True)
    return cluster.astype(np.int64)
