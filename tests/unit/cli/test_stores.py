"""Runs are found in stores that nobody named: the default one, and those in results/."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from services.contracts import Run

Command = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def in_results(stored: Path) -> Path:
    """The store of a run that was made with `keepwarm run` and no --out; we are in `tmp_path`."""
    place = Path("results") / "claims-1" / "keepwarm.sqlite"
    place.parent.mkdir(parents=True)
    shutil.move(stored, place)
    return place


@pytest.mark.usefixtures("in_results")
def test_status_without_a_store_looks_into_results(
    run: Run, keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("status", "--json") == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert status["run_id"] == run.run_id


@pytest.mark.usefixtures("in_results")
@pytest.mark.parametrize(
    "arguments", [("report",), ("export", "--format", "jsonl", "-o", "out.jsonl"), ("dead", "list")]
)
def test_a_run_in_results_is_found_by_its_name(
    arguments: tuple[str, ...], run: Run, keepwarm: Command
) -> None:
    words = 2 if arguments[0] == "dead" else 1
    assert keepwarm(*arguments[:words], run.run_id[:8], *arguments[words:]) == 0


def test_the_default_store_and_those_in_results_are_listed_together(
    in_results: Path, keepwarm: Command, capsys: Capture, tmp_path: Path
) -> None:
    default = tmp_path / "state" / "keepwarm" / "keepwarm.sqlite"
    default.parent.mkdir(parents=True)
    shutil.copy(in_results, default)
    assert keepwarm("status", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_a_file_that_is_no_store_is_reported_and_hides_no_other(
    in_results: Path, run: Run, keepwarm: Command, capsys: Capture
) -> None:
    bad = Path("results") / "claims-2" / "keepwarm.sqlite"
    bad.parent.mkdir()
    bad.write_bytes(b"no database, but a text that is longer than a header\n" * 100)
    assert keepwarm("status", "--json") == 0
    seen = capsys.readouterr()
    assert len(json.loads(seen.out)) == 1
    assert "skipped a store: " in seen.err and str(bad) in seen.err
    assert keepwarm("report", run.run_id) == 0


def test_where_there_is_no_store_at_all_the_places_are_named(
    keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("status") == 6
    said = capsys.readouterr().err
    for part in ("there is no store at", "results/*/keepwarm.sqlite", "--store"):
        assert part in said


@pytest.mark.usefixtures("in_results")
def test_a_run_that_no_store_has_is_reported_with_those_that_exist(
    run: Run, keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("report", "run-nope") == 6
    assert run.run_id in capsys.readouterr().err


def test_a_store_that_is_named_is_the_only_one(
    in_results: Path, keepwarm: Command, tmp_path: Path
) -> None:
    assert in_results.exists()
    assert keepwarm("status", "--store", str(tmp_path / "other.sqlite")) == 6


def test_a_cell_of_a_sweep_is_named_by_its_directory(
    in_results: Path, run: Run, keepwarm: Command, capsys: Capture
) -> None:
    cell = in_results.parent / f"few-shot-my-model-{run.run_id.removeprefix('run-')}"
    cell.mkdir()
    assert keepwarm("report", str(cell), "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"]["run_id"] == run.run_id
    (in_results.parent / "logs").mkdir()
    assert keepwarm("report", str(in_results.parent / "logs")) == 6
