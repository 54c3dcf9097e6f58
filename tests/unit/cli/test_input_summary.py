import json
from pathlib import Path
from typing import Any

from services.cli.input_summary import summary_lines
from services.contracts import PromptSpec
from services.producer import ClaimsFile, Selection, Source

PROMPT = PromptSpec()


def summary_of(path: Path, selection: Selection | None = None) -> list[str]:
    with Source.open(str(path)) as source:
        file = ClaimsFile(source, PROMPT, selection or Selection())
        return summary_lines(file, file.inspect())


def written(directory: Path, *records: dict[str, Any]) -> Path:
    path = directory / "claims.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_summary_counts_the_records_that_are_not_selected(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    path.write_text('{"id": "a", "claim": "A."}\nnonsense\n{"id": "b", "claim": "B."}\n')
    counts, _ = summary_of(path, Selection(only=frozenset("b")))
    assert counts.endswith("3 records: 1 claim, 0 repeated, 0 rejected, 2 not selected")


def test_rows_that_are_merged_are_counted(repository: Path) -> None:
    counts, *_ = summary_of(repository / "tests" / "published" / "fever_rows.jsonl")
    assert "3 rows merged into 2 records: 2 claims" in counts


def test_two_labels_of_a_record_that_differ_are_told_with_the_one_that_is_used(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path,
        {"claim": "A.", "Verdict": "REFUTES", "label": "SUPPORTS"},
        {"claim": "B.", "Verdict": "SUPPORTS", "label": "SUPPORTS", "statement": "B."},
        {"claim": "C.", "Verdict": "NEI", "label": "REFUTES", "id": 7, "claim_id": 8},
    )
    _, labels, warning = summary_of(path)
    assert labels.startswith("labels SUPPORTS: 2, REFUTES: 1;")
    assert warning == (
        "Warning: 'label' and 'Verdict' differ in 2 records; 'label' is used (the other one: "
        "--column label=Verdict)"
    )
    other = summary_of(path, Selection(columns={"label": "Verdict"}))
    assert len(other) == 2
    assert other[1].startswith("labels REFUTES: 1, SUPPORTS: 1")
