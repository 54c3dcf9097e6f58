import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from services.contracts import DeadReason, Run
from services.contracts.errors import StoreError
from services.store import Report, Store, build_report, find_run, quality_of

# Gold label -> verdict -> claims. Two verdicts could not be read; gold C never occurs.
CONFUSION = {
    "A": {"A": 7, "B B": 2, "C": 1, "INVALID": 2},
    "B B": {"A": 3, "B B": 5, "C": 0, "INVALID": 0},
}


def report_of(store: Store, run: Run) -> Report:
    return build_report(store, find_run(store, run.run_id))


def write(
    store: Store, make: SimpleNamespace, confusion: dict[str, dict[str, int]], unlabelled: int = 0
) -> None:
    pairs = [
        (gold, label)
        for gold, counts in confusion.items()
        for label, count in counts.items()
        for _ in range(count)
    ]
    verdicts = [make.verdict(n, label, gold=gold) for n, (gold, label) in enumerate(pairs)]
    verdicts += [make.verdict(1_000 + n, "C") for n in range(unlabelled)]
    store.write(make.incoming(make.announced(claims=len(verdicts)), make.batch(*verdicts)))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval, as scipy has it."""
    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def macro_f1(confusion: dict[str, dict[str, int]]) -> float:
    """The mean of F1 over the gold labels, as scikit-learn has it."""
    pairs = [
        (gold, said) for gold, row in confusion.items() for said, n in row.items() for _ in range(n)
    ]
    gold, said = zip(*pairs, strict=True)
    return float(f1_score(gold, said, labels=[*confusion], average="macro", zero_division=0))


def test_the_confusion_matrix_is_that_of_the_claims(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, CONFUSION)
    quality = report_of(store, run).quality
    assert quality is not None
    assert quality.confusion == CONFUSION
    assert [list(row) for row in quality.confusion.values()] == [["A", "B B", "C", "INVALID"]] * 2


def test_accuracy_counts_what_could_not_be_read_as_wrong(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, CONFUSION)
    quality = report_of(store, run).quality
    assert quality is not None
    assert (quality.labelled, quality.correct) == (20, 12)
    assert quality.accuracy == 0.6
    assert quality.accuracy_interval == pytest.approx(wilson(12, 20), abs=1e-9)


def test_macro_f1_is_the_mean_over_the_gold_labels_that_occur(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, CONFUSION)
    quality = report_of(store, run).quality
    assert quality is not None
    # A: 2*7 / (10 said + 12 gold); B B: 2*5 / (7 said + 8 gold).
    assert quality.macro_f1 == pytest.approx((14 / 22 + 10 / 15) / 2, abs=1e-12)
    assert macro_f1(CONFUSION) == pytest.approx(quality.macro_f1, abs=1e-12)


@pytest.mark.parametrize(
    "confusion",
    [
        {"A": {"A": 1}},
        {"A": {"B B": 1}},
        {"A": {"INVALID": 3}},
        {"A": {"A": 10}, "B B": {"B B": 10}, "C": {"C": 10}},
        {"A": {"C": 4}, "B B": {"A": 5}, "C": {"B B": 6}},
        {"A": {"A": 9, "INVALID": 1}, "C": {"INVALID": 5, "C": 2}},
    ],
    ids=["one right", "one wrong", "unreadable", "all right", "all wrong", "mixed"],
)
def test_scores_are_those_of_the_formulas_at_every_edge(
    confusion: dict[str, dict[str, int]], store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, confusion)
    quality = report_of(store, run).quality
    assert quality is not None
    total = sum(sum(row.values()) for row in confusion.values())
    correct = sum(row.get(gold, 0) for gold, row in confusion.items())
    assert (quality.labelled, quality.correct) == (total, correct)
    assert quality.accuracy_interval == pytest.approx(wilson(correct, total), abs=1e-9)
    assert quality.macro_f1 == pytest.approx(macro_f1(confusion), abs=1e-12)
    filled = {
        gold: {"A": 0, "B B": 0, "C": 0, "INVALID": 0} | row for gold, row in confusion.items()
    }
    assert quality.confusion == filled


def test_claims_without_a_gold_label_are_not_judged(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, {"A": {"A": 1}}, unlabelled=5)
    report = report_of(store, run)
    assert report.quality is not None
    assert report.quality.labelled == 1
    assert report.verdicts == {"A": 1, "B B": 0, "C": 5, "INVALID": 0}


def test_without_a_gold_label_there_is_no_quality(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, {}, unlabelled=5)
    assert report_of(store, run).quality is None


def test_dead_claims_are_counted_by_reason_and_not_judged(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=5),
            make.batch(make.verdict(0, gold="A")),
            make.dead(1),
            make.dead(2),
            make.dead(3, reason=DeadReason.ENGINE_REFUSED),
        )
    )
    report = report_of(store, run)
    assert report.dead == {"too-long": 2, "engine-refused": 1}
    assert report.quality is not None
    assert report.quality.labelled == 1


def test_lines_are_claims_and_repeated_and_rejected_ones(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=10, repeated=2, rejected=3)))
    assert report_of(store, run).lines == 15
    store.write(make.incoming(make.announced()))
    assert report_of(store, run).lines == 15


def test_a_run_with_nothing_in_it_yet_can_be_reported(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced()))
    report = report_of(store, run)
    assert report.run == run
    assert (report.lines, report.quality, report.speed, report.workers) == (None, None, None, ())
    assert report.verdicts == {"A": 0, "B B": 0, "C": 0, "INVALID": 0}


def test_a_run_that_was_not_announced_can_be_reported(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1, "B B", gold="A"))))
    report = report_of(store, run)
    assert report.run is None
    assert report.verdicts == {"B B": 1, "INVALID": 0}
    assert report.quality is not None
    assert report.quality.confusion == {"A": {"A": 0, "B B": 1, "INVALID": 0}}


def test_speed_is_from_the_first_request_to_the_last_verdict(
    store: Store, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    store.write(
        make.incoming(
            make.batch(make.verdict(0), make.verdict(1), batch_id="1", engine_seconds=5.0),
            make.batch(make.verdict(1), make.verdict(2), batch_id="2", engine_seconds=1.0),
        )
    )
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("UPDATE deliveries SET received_at = 100 + 15 * (batch_id = '2')")
    speed = report_of(store, run).speed
    assert speed is not None
    assert speed.wall_seconds == 20
    assert speed.claims_per_second == 3 / 20
    assert speed.prompt_tokens == 40
    assert speed.tokens_per_second == 2


def test_each_worker_and_device_has_its_share(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.batch(make.verdict(0), worker_id="a", device="T4", engine_seconds=1.0),
            make.batch(
                *(make.verdict(n) for n in (1, 2, 3)), worker_id="b", device="H100", attempt=2
            ),
            make.batch(make.verdict(0), make.verdict(4), worker_id="a", device="T4"),
        )
    )
    report = report_of(store, run)
    shares = {share.worker_id: share for share in report.workers}
    assert [share.worker_id for share in report.workers] == ["b", "a"]
    assert (shares["a"].verdicts, shares["a"].duplicates) == (2, 1)
    assert (shares["a"].device, shares["a"].engine_seconds) == ("T4", 3.0)
    assert (shares["b"].verdicts, shares["b"].prompt_tokens) == (3, 30)
    assert report.redelivered_batches == 1


def test_another_runs_verdicts_are_not_in_the_report(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(),
            make.batch(make.verdict(0, gold="A")),
            make.batch(make.verdict(1, "C", gold="A"), of=other_run),
            make.dead(2, of=other_run),
        )
    )
    report = report_of(store, run)
    assert report.verdicts["C"] == 0
    assert report.dead == {}
    assert report.quality is not None
    assert report.quality.accuracy == 1


def test_a_report_is_json_and_back(store: Store, make: SimpleNamespace, run: Run) -> None:
    write(store, make, CONFUSION, unlabelled=2)
    report = report_of(store, run)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_run_that_is_not_in_the_store_cannot_be_reported(
    store: Store, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    store.write(make.incoming(make.announced()))
    known = find_run(store, run.run_id)
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("DELETE FROM runs")
    with pytest.raises(StoreError, match=f"the store has no run {run.run_id}"):
        build_report(store, known)


def test_the_quality_over_some_claims_is_that_of_these_claims(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    write(store, make, CONFUSION, unlabelled=2)
    known = find_run(store, run.run_id)
    # The first twelve claims have the gold label A, the others B B.
    first = quality_of(store, known, lambda claim_id: int(claim_id.removeprefix("c")) < 12)
    assert first is not None and first.confusion == {"A": CONFUSION["A"]}
    assert (first.labelled, first.correct) == (12, 7)
    assert quality_of(store, known, lambda _: True) == build_report(store, known).quality
    assert quality_of(store, known, lambda _: False) is None
