import csv
import json
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from services.contracts import Run
from services.contracts.errors import StoreError
from services.contracts.prompts import Reasoning
from services.contracts.runs import InputSummary
from services.store import Store, build_report, export_run, find_run

FORMATS = ("jsonl", "csv", "parquet", "fever")


@pytest.fixture
def filled(store: Store, make: SimpleNamespace) -> Store:
    """Claims at 0, 2, 3 and 5, come in another order; that at 3 is dead, that at 5 unreadable."""
    store.write(
        make.incoming(
            make.batch(
                make.verdict(5, "INVALID", probabilities=(), mass=0.0, raw_text='"\n,Ł'),
                make.verdict(2, "B B", gold="B B"),
                batch_id="1",
            ),
            make.dead(3),
            make.batch(make.verdict(0), batch_id="2", worker_id="node-2", attempt=3),
            make.announced(claims=4, rejected=2),
        )
    )
    return store


def export(store: Store, run: Run, format: str, path: Path) -> int:
    return export_run(store, find_run(store, run.run_id), format, path)  # type: ignore[arg-type]


def json_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_jsonl_has_a_row_a_claim_in_the_inputs_order(
    filled: Store, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    assert export(filled, run, "jsonl", path) == 4
    rows = json_rows(path)
    assert [row["position"] for row in rows] == [0, 2, 3, 5]
    assert [row["claim_id"] for row in rows] == ["c0", "c2", "c3", "c5"]
    assert [row["label"] for row in rows] == ["A", "B B", None, "INVALID"]
    assert rows[1] == {
        "position": 2,
        "claim_id": "c2",
        "claim": "Claim 2, Łódź.",
        "label": "B B",
        "probabilities": {"A": 0.5, "B B": 0.25, "C": 0.25},
        "gold": "B B",
        "mass": 0.75,
        "raw_text": " one",
        "prompt_tokens": 10,
        "dead_reason": None,
        "dead_detail": None,
        "worker_id": "node-1",
        "device": "Tesla T4",
        "attempt": 1,
        "engine_seconds": 2.0,
    }
    assert (rows[0]["worker_id"], rows[0]["attempt"]) == ("node-2", 3)


def test_a_dead_claim_has_its_reason_and_no_label(filled: Store, run: Run, tmp_path: Path) -> None:
    export(filled, run, "jsonl", tmp_path / "out.jsonl")
    dead = json_rows(tmp_path / "out.jsonl")[2]
    assert (dead["label"], dead["probabilities"], dead["mass"]) == (None, None, None)
    assert (dead["dead_reason"], dead["dead_detail"]) == ("too-long", "it has 9,999 tokens")
    assert (dead["claim"], dead["gold"]) == ("Claim 3, Łódź.", "B B")


def test_what_could_not_be_read_has_no_probabilities(
    filled: Store, run: Run, tmp_path: Path
) -> None:
    export(filled, run, "jsonl", tmp_path / "out.jsonl")
    unreadable = json_rows(tmp_path / "out.jsonl")[3]
    assert (unreadable["label"], unreadable["probabilities"]) == ("INVALID", None)
    assert unreadable["raw_text"] == '"\n,Ł'


def test_text_in_jsonl_is_readable_as_it_is(filled: Store, run: Run, tmp_path: Path) -> None:
    export(filled, run, "jsonl", tmp_path / "out.jsonl")
    assert "Łódź" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_csv_has_a_column_a_label(filled: Store, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert export(filled, run, "csv", path) == 4
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["position"] for row in rows] == ["0", "2", "3", "5"]
    assert [row["label"] for row in rows] == ["A", "B B", "", "INVALID"]
    assert (rows[1]["p:A"], rows[1]["p:B B"], rows[1]["p:C"]) == ("0.5", "0.25", "0.25")
    assert (rows[2]["p:A"], rows[2]["dead_reason"]) == ("", "too-long")
    assert rows[3]["raw_text"] == '"\n,Ł'
    assert "probabilities" not in rows[0]


def test_parquet_has_typed_columns(filled: Store, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    assert export(filled, run, "parquet", path) == 4
    table = pq.read_table(path)
    rows = table.to_pylist()
    assert [row["position"] for row in rows] == [0, 2, 3, 5]
    assert [row["label"] for row in rows] == ["A", "B B", None, "INVALID"]
    assert (rows[1]["p:B B"], rows[2]["p:B B"]) == (0.25, None)
    assert rows[3]["raw_text"] == '"\n,Ł'
    assert str(table.schema.field("position").type) == "int64"
    assert str(table.schema.field("p:A").type) == "double"


def test_fever_has_a_prediction_for_every_line_up_to_the_last_claim(
    filled: Store, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    assert export(filled, run, "fever", path) == 6
    predictions = [
        ("c0", "A"),
        (None, "INVALID"),
        ("c2", "B B"),
        ("c3", "INVALID"),
        (None, "INVALID"),
        ("c5", "INVALID"),
    ]
    assert json_rows(path) == [
        {"id": claim_id, "predicted_label": label, "predicted_evidence": []}
        for claim_id, label in predictions
    ]


def test_fever_has_the_ids_of_records_without_a_claim_and_the_verdicts_of_repeated_ones(
    store: Store, run: Run, make: SimpleNamespace, tmp_path: Path
) -> None:
    found = InputSummary(
        format="FEVER",
        container="JSONL",
        records=4,
        claims=2,
        repeated=1,
        rejected=(("claim: blank", 1),),
        without_evidence=(),
        gold=(),
        unlabelled=2,
        kept_back=0,
        unknown_labels=(),
        own_ids=1,
        numeric_ids=True,
        left_out=((1, "70"), (3, "73")),
    )
    announced = make.announced(claims=2, rejected=2).model_copy(update={"input": found})
    verdicts = (make.verdict(0, claim_id="70"), make.verdict(2, claim_id="70#c8947dfe"))
    store.write(make.incoming(announced, make.batch(*verdicts)))
    assert export(store, run, "fever", tmp_path / "out.jsonl") == 4
    ids = [(row["id"], row["predicted_label"]) for row in json_rows(tmp_path / "out.jsonl")]
    assert ids == [(70, "A"), (70, "A"), (70, "A"), (73, "INVALID")]


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_without_outcomes_is_a_file_without_rows(
    format: str, store: Store, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    store.write(make.incoming(make.announced()))
    path = tmp_path / "out"
    assert export(store, run, format, path) == 0
    assert path.exists()
    if format == "parquet":
        assert pq.read_table(path).num_rows == 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_that_was_not_announced_yet_can_be_exported(
    format: str, store: Store, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    store.write(make.incoming(make.batch(make.verdict(0), make.verdict(1))))
    assert export(store, run, format, tmp_path / "out") == 2


def test_another_runs_claims_are_not_exported(
    filled: Store, make: SimpleNamespace, run: Run, other_run: Run, tmp_path: Path
) -> None:
    filled.write(make.incoming(make.batch(make.verdict(1), of=other_run)))
    assert export(filled, run, "jsonl", tmp_path / "a.jsonl") == 4
    assert export(filled, other_run, "jsonl", tmp_path / "b.jsonl") == 1


def test_more_rows_than_are_held_at_once_are_exported_whole(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.store.export._CHUNK_ROWS", 100)
    for count in (200, 250):
        verdicts = [make.verdict(n) for n in range(count)]
        store.write(make.incoming(make.announced(claims=count), make.batch(*verdicts)))
        assert export(store, run, "parquet", tmp_path / "out.parquet") == count
        positions = pq.read_table(tmp_path / "out.parquet", columns=["position"])["position"]
        assert positions.to_pylist() == list(range(count))


# Whole or not at all.


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_takes_the_place_of_the_old_file(
    format: str, filled: Store, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "er" / "out"
    export(filled, run, format, path)
    first = path.read_bytes()
    path.write_text("old")
    export(filled, run, format, path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("format", FORMATS)
def test_when_rows_fail_half_way_the_old_file_stays(
    format: str, store: Store, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    verdicts = [make.verdict(n) for n in range(300)]
    store.write(make.incoming(make.announced(claims=300), make.batch(*verdicts)))
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("UPDATE outcomes SET probabilities = '{broken' WHERE position = 250")
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ValueError, match="Expecting property name"):
        export(store, run, format, path)
    assert path.read_text() == "old"
    assert not [name for name in tmp_path.iterdir() if name.name.endswith(".part")]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_a_store_error_and_the_old_file_stays(
    format: str, filled: Store, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    open_file = Path.open

    def open_on_a_full_disk(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        target = Path("/dev/full") if self.name.endswith(".part") else self
        return open_file(target, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    with pytest.raises(StoreError, match="No space left on device; free disk space"):
        export(filled, run, format, path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("format", FORMATS)
def test_a_place_that_cannot_hold_a_file_is_a_store_error(
    format: str, filled: Store, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    for place in (tmp_path / "file" / "out", tmp_path / "directory"):
        with pytest.raises(StoreError, match="cannot be written: .*choose another path"):
            export(filled, run, format, place)


def test_a_directory_that_this_user_may_not_write_to_is_a_store_error(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    open_dir: Path,
    unprivileged: Callable[[], AbstractContextManager[None]],
) -> None:
    store.write(make.incoming(make.announced()))
    open_dir.chmod(0o555)
    known = find_run(store, run.run_id)
    with unprivileged(), pytest.raises(StoreError, match="Permission denied; fix its permissions"):
        export_run(store, known, "jsonl", open_dir / "out.jsonl")


def test_fever_refuses_several_claims_of_one_record(
    store: Store, run: Run, make: SimpleNamespace, tmp_path: Path
) -> None:
    pieces = (make.verdict(0, claim_id="0#1"), make.verdict(0, claim_id="0#2"))
    store.write(make.incoming(make.announced(claims=2), make.batch(*pieces)))
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(StoreError, match="several claims for one record .* use --format jsonl"):
        export(store, run, "fever", path)
    assert not path.exists()


def test_a_run_whose_prompt_reasons_first_has_columns_for_it_and_no_other_has(
    store: Store, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    prompt = run.prompt.model_copy(
        update={"template": "{claim}\nReasoning:", "reasoning": Reasoning(max_tokens=8)}
    )
    reasons = run.model_copy(update={"prompt": prompt})
    thought = make.verdict(0, reasoning=" It says so.", reasoning_tokens=4)
    store.write(
        make.incoming(
            make.announced(claims=2, of=reasons),
            make.batch(thought, make.verdict(1, reasoning=""), of=reasons),
            make.announced(claims=1),
            make.batch(make.verdict(0)),
        )
    )
    for each, names in ((run, set()), (reasons, {"reasoning", "reasoning_tokens"})):
        for format in FORMATS[:3]:
            export(store, each, format, tmp_path / format)
        table = pq.read_table(tmp_path / "parquet")
        with (tmp_path / "csv").open(newline="", encoding="utf-8") as file:
            header, *_ = csv.reader(file)
        first, *_ = json_rows(tmp_path / "jsonl")
        for columns in (table.column_names, header, first):
            assert {name for name in columns if "reasoning" in name} == names
    assert [
        (row["reasoning"], row["reasoning_tokens"]) for row in json_rows(tmp_path / "jsonl")
    ] == [
        (" It says so.", 4),
        ("", 0),
    ]
    assert table.column("reasoning_tokens").to_pylist() == [4, 0]
    known = find_run(store, reasons.run_id)
    speed = build_report(store, known).speed
    assert speed is not None and speed.reasoning_tokens == 4
