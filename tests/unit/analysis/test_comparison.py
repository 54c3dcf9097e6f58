from types import SimpleNamespace

import pytest

from services.analysis import Comparison, LabelCodes, compare_runs, read_outcomes
from services.analysis.pairs import Correction
from services.contracts import Run
from services.contracts.errors import UsageError
from services.contracts.proofs import verdict_proof
from services.store import Store, find_run

GOLD = ["A"] * 30 + ["B B"] * 20 + ["C"] * 10


def write(
    store: Store, make: SimpleNamespace, run: Run, labels: list[str], gold: list[str]
) -> None:
    """Verdicts on claims of which two share evidence."""
    verdicts = [
        make.verdict(n, label, gold=truth)
        for n, (label, truth) in enumerate(zip(labels, gold, strict=True))
    ]
    proofs = tuple(verdict_proof("0" * 24, f"Evidence {n // 2}.") for n in range(len(labels)))
    announced = make.announced(claims=len(labels), of=run)
    store.write(make.incoming(announced, make.batch(*verdicts, of=run, proofs=proofs)))


def compared(store: Store, *runs: Run, correction: Correction = Correction.HOLM) -> Comparison:
    codes = LabelCodes()
    found = (read_outcomes(store, find_run(store, run.run_id), codes) for run in runs)
    return compare_runs(found, codes, correction)


def test_runs_are_in_the_order_of_their_accuracy(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    write(store, make, run, ["A"] * 60, GOLD)
    write(store, make, other_run, GOLD[:50] + ["INVALID"] * 4 + ["A"] * 6, GOLD)
    found = compared(store, run, other_run)
    assert (found.claims, found.clusters) == (60, 30)
    assert [each.run_id for each in found.runs] == [other_run.run_id, run.run_id]
    assert [each.scores.accuracy.value for each in found.runs] == [50 / 60, 30 / 60]
    assert [each.invalid for each in found.runs] == [4, 0]
    assert [each.rank for each in found.runs] == [(1, 1), (2, 2)]
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.difference) == (0, 1, pytest.approx(1 / 3))
    assert pair.p_value == pytest.approx(2 / 2**10)


def test_the_majority_baseline_answers_the_most_frequent_gold_label(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, run, GOLD, GOLD)
    found = compared(store, run)
    assert (found.majority_label, found.majority.accuracy.value) == ("A", 0.5)
    assert found.majority.balanced_accuracy.value == pytest.approx(1 / 3)
    assert (found.pairs, found.runs[0].rank) == ((), (1, 1))


def test_a_run_within_noise_is_no_winner(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    write(store, make, run, ["A"] * 60, GOLD)
    write(store, make, other_run, ["A"] * 57 + ["C"] * 3, GOLD)
    assert [each.rank for each in compared(store, run, other_run).runs] == [(1, 2), (1, 2)]


def test_the_correction_is_stated_and_used(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    third = run.model_copy(update={"source_digest": "src-02"})
    for each, right in ((run, 0), (other_run, 12), (third, 24)):
        write(store, make, each, GOLD[:right] + ["INVALID"] * (60 - right), GOLD)
    holm = compared(store, run, other_run, third)
    others = compared(store, run, other_run, third, correction=Correction.BENJAMINI_HOCHBERG)
    assert (holm.correction, others.correction) == ("holm", "bh")
    raw = [pair.p_value for pair in holm.pairs]
    assert [pair.p_value for pair in others.pairs] == raw
    assert max(pair.adjusted_p_value for pair in holm.pairs) == pytest.approx(2 * max(raw))
    assert max(pair.adjusted_p_value for pair in others.pairs) == pytest.approx(max(raw))


def test_runs_of_other_claims_cannot_be_compared(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    write(store, make, run, GOLD, GOLD)
    store.write(make.incoming(make.batch(make.verdict(99, gold="A"), of=other_run)))
    with pytest.raises(UsageError, match="no claim .* Name runs of the same claims"):
        compared(store, run, other_run)


def test_gold_labels_with_other_names_are_refused_with_both_names(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    write(store, make, run, GOLD, ["A"] * 60)
    write(store, make, other_run, GOLD, ["yes"] * 60)
    with pytest.raises(UsageError, match="differ: A / yes 60. Give the labels the same names"):
        compared(store, run, other_run)


def test_claims_without_gold_labels_are_refused(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1))))
    with pytest.raises(UsageError, match="gold label in every run. Add labels"):
        compared(store, run)
