import tracemalloc
from types import SimpleNamespace

import numpy as np

from services.analysis.outcomes import LabelCodes, RunOutcomes, align, cluster_claims, read_outcomes
from services.contracts import Run
from services.contracts.proofs import verdict_proof
from services.contracts.runs import InputSummary
from services.store import Store, find_run


def read(store: Store, run: Run, codes: LabelCodes, **options: bool) -> RunOutcomes:
    return read_outcomes(store, find_run(store, run.run_id), codes, **options)


def with_proofs(
    make: SimpleNamespace, run: Run, evidence: dict[int, str | None], **changes: object
):
    """A batch of verdicts whose proofs name the evidence."""
    verdicts = [make.verdict(number, gold="A", **changes) for number in evidence]
    proofs = tuple(verdict_proof("0" * 24, each) for each in evidence.values())
    return make.batch(*verdicts, of=run, proofs=proofs)


def test_only_verdicts_are_read_and_dead_claims_are_counted(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=5),
            make.batch(make.verdict(0, "A", gold="A"), make.verdict(1, "INVALID", gold="B B")),
            make.dead(2),
            make.dead(3),
        )
    )
    codes = LabelCodes()
    found = read(store, run, codes)
    assert found.dead == 2
    assert len(found.verdicts) == 2
    assert {codes.names[code] for code in found.verdicts["label"]} == {"A", "INVALID"}
    assert {codes.names[code] for code in found.verdicts["gold"]} == {"A", "B B"}
    assert found.labels == ()


def test_probabilities_are_read_by_label_and_missing_ones_are_nan(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    scored = make.verdict(0, gold="A", probabilities=(0.5, 0.25, 0.25))
    unscored = make.verdict(1, "INVALID", gold="C", probabilities=())
    store.write(make.incoming(make.announced(claims=2), make.batch(scored, unscored)))
    found = read(store, run, LabelCodes(), probabilities=True)
    assert found.labels == run.prompt.label_names
    rows = sorted(found.verdicts["probabilities"].tolist(), key=str)
    assert rows[0] == [0.5, 0.25, 0.25]
    assert np.isnan(rows[1]).all()


def test_probabilities_of_a_run_that_was_not_announced_are_by_the_labels_of_its_verdicts(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(0, gold="A"))))
    found = read(store, run, LabelCodes(), probabilities=True)
    assert found.labels == run.prompt.label_names
    assert found.verdicts["probabilities"].tolist() == [[0.5, 0.25, 0.25]]


def test_runs_are_aligned_by_id_and_text_whatever_the_order(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    golds = dict(enumerate(["A", "B B", "C", "A", "C"]))
    first = [make.verdict(n, "A", gold=gold) for n, gold in golds.items()]
    second = [make.verdict(n, "C", gold=golds[n]) for n in (4, 2, 1)]
    second.append(make.verdict(3, "C", gold="A", text="Another text."))
    store.write(make.incoming(make.batch(*first), make.batch(*second, of=other_run)))
    codes = LabelCodes()
    aligned = align(read(store, each, codes) for each in (run, other_run))
    assert aligned.in_each == len(aligned.gold) == 3
    assert sorted(codes.names[gold] for gold in aligned.gold) == ["B B", "C", "C"]
    assert [{codes.names[code] for code in given} for given in aligned.given] == [{"A"}, {"C"}]
    assert [each.verdicts for each in aligned.counts] == [5, 4]


def test_claims_with_another_gold_label_or_none_are_left_out_and_counted(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    golds = [
        ("A", "A"),
        ("A", "C"),
        ("A", "C"),
        ("B B", "A"),
        ("A", None),
        (None, "A"),
        (None, None),
    ]
    for index, each in enumerate((run, other_run)):
        verdicts = [make.verdict(n, gold=pair[index]) for n, pair in enumerate(golds)]
        store.write(make.incoming(make.batch(*verdicts, of=each)))
    codes = LabelCodes()
    aligned = align(read(store, each, codes) for each in (run, other_run))
    assert (aligned.in_each, aligned.gold.size, aligned.without_gold) == (7, 1, 3)
    differ = {(codes.names[a], codes.names[b]): n for a, b, n in aligned.gold_differs}
    assert differ == {("A", "C"): 2, ("B B", "A"): 1}


def test_a_gold_label_that_differs_in_the_third_run_is_noticed(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    third = run.model_copy(update={"source_digest": "src-02"})
    for each, golds in ((run, "AA"), (other_run, "AA"), (third, "AC")):
        verdicts = [make.verdict(n, gold=gold) for n, gold in enumerate(golds)]
        store.write(make.incoming(make.batch(*verdicts, of=each)))
    aligned = align(read(store, each, LabelCodes()) for each in (run, other_run, third))
    assert aligned.gold.size == 1
    assert [number for *_, number in aligned.gold_differs] == [1]


def test_claims_with_the_same_evidence_are_one_cluster(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    evidence = {0: "One.", 1: "Two.", 2: "One.", 3: None, 4: None}
    store.write(make.incoming(with_proofs(make, run, evidence)))
    aligned = align([read(store, run, LabelCodes())])
    assert aligned.clusters == 4
    assert sorted(np.bincount(aligned.cluster)) == [1, 1, 1, 2]


def test_claims_that_had_one_id_in_the_file_are_one_cluster(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    verdicts = [
        make.verdict(n, gold="A", claim_id=claim_id)
        for n, claim_id in enumerate(["7", "7#00112233", "8", "8#not-a-mark"])
    ]
    store.write(make.incoming(make.announced(claims=4), make.batch(*verdicts)))
    assert align([read(store, run, LabelCodes())]).clusters == 4  # they may be the file's own ids
    store.set_input(run.run_id, SUMMARY.model_copy(update={"own_ids": 1}))
    assert align([read(store, run, LabelCodes())]).clusters == 3


def test_clusters_join_over_ids_and_over_the_evidence_of_each_run() -> None:
    ids = np.array([1, 1, 2, 3, 4], np.uint64)
    first = np.array([10, 11, 12, 13, 14], np.int64)
    second = np.array([20, 21, 21, 22, 23], np.int64)
    assert cluster_claims(ids, [first]).tolist() == [0, 0, 1, 2, 3]
    assert cluster_claims(ids, [first, second]).tolist() == [0, 0, 0, 1, 2]
    assert cluster_claims(ids[:0], [first[:0]]).tolist() == []


def test_evidence_that_the_store_does_not_know_is_counted(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    older = make.batch(*(make.verdict(n, gold="A") for n in (5, 6, 7)))
    store.write(
        make.incoming(make.announced(claims=5), with_proofs(make, run, {0: "One.", 1: None}), older)
    )
    assert read(store, run, LabelCodes()).unknown_evidence == 0  # the input is not known either
    store.set_input(run.run_id, SUMMARY.model_copy(update={"without_evidence": (("none", 1),)}))
    assert read(store, run, LabelCodes()).unknown_evidence == 3


def test_claims_are_read_in_bounded_memory(store: Store, make: SimpleNamespace, run: Run) -> None:
    claims = 40_000
    for start in range(0, claims, 1_000):
        verdicts = (make.verdict(n, gold="A") for n in range(start, start + 1_000))
        store.write(make.incoming(make.batch(*verdicts, batch_id=f"{start}")))
    read(store, run, LabelCodes())
    tracemalloc.start()
    found = read(store, run, LabelCodes())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.verdicts) == claims
    assert found.verdicts.itemsize == 29
    # Twice the array, and the rows of one chunk.
    assert peak < claims * 29 * 3 + 20_000_000


SUMMARY = InputSummary(
    format="claims",
    container="JSONL",
    records=5,
    claims=5,
    repeated=0,
    rejected=(),
    without_evidence=(),
    gold=(),
    unlabelled=0,
    kept_back=0,
    unknown_labels=(),
    own_ids=0,
    numeric_ids=False,
)
