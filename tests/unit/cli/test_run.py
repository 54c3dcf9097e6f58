"""The results of `keepwarm run`; the integration tests have the rest."""

import io
import json
from pathlib import Path

import pytest

from services.cli.run import write_results
from services.cli.screen import Screen
from services.contracts import Run, load_settings
from services.contracts.errors import StoreError
from services.store import Store


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def write(stored: Path, run_id: str, directory: Path, screen: Screen) -> str:
    with Store.open(load_settings(store_url=str(stored))) as store:
        write_results(screen, store, run_id, directory)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_results_are_rows_and_a_report(
    stored: Path, run: Run, output_dir: Path, screen: Screen
) -> None:
    printed = write(stored, run.run_id, output_dir, screen)
    rows = (output_dir / "verdicts.jsonl").read_text().splitlines()
    assert [json.loads(row)["claim_id"] for row in rows] == ["c0", "c1"]
    report = json.loads((output_dir / "report.json").read_text())
    assert report["status"]["run_id"] == run.run_id
    assert report["status"]["done"] == 2
    assert "Results are in" in printed


def test_a_run_that_is_not_in_the_store_has_no_results(
    stored: Path, output_dir: Path, screen: Screen
) -> None:
    write(stored, "run-other", output_dir, screen)
    assert list(output_dir.iterdir()) == []


def test_a_report_that_cannot_be_written_is_a_store_error(
    stored: Path, run: Run, output_dir: Path, screen: Screen
) -> None:
    (output_dir / "report.json").mkdir()
    with pytest.raises(StoreError, match=r"report\.json cannot be written: Is a directory"):
        write(stored, run.run_id, output_dir, screen)


@pytest.mark.parametrize("name", ["claims[final]-1", "a[bold]b", "x[/y]"])
def test_the_path_of_the_results_is_shown_as_it_is(
    name: str, stored: Path, run: Run, tmp_path: Path, screen: Screen
) -> None:
    directory = tmp_path / name
    directory.mkdir(parents=True)
    assert f"/{name}/" in write(stored, run.run_id, directory, screen).replace("\n", "")
