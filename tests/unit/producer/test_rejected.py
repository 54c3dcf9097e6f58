import json
from pathlib import Path

import pytest

from services.contracts.errors import StoreError
from services.producer import RejectedFile, Rejection

REJECTION = Rejection(
    source="claims.jsonl",
    line=7,
    field="claim",
    kind="claim: blank",
    reason="it is blank",
    next_step="give it some text",
    content='{"claim": "Łódź\ud83d\ude00"}'.encode("utf-16", "surrogatepass").decode("utf-16"),
)


def test_without_a_rejection_there_is_no_file(tmp_path: Path) -> None:
    with RejectedFile(tmp_path / "rejected.jsonl"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_an_earlier_time_does_not_outlive_a_run_without_rejections(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rejected.jsonl"
    path.write_text("old\n")
    with RejectedFile(path):
        pass
    assert not path.exists()


def test_each_rejection_is_a_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "rejected.jsonl"
    with RejectedFile(path) as rejected:
        rejected.write(REJECTION)
        rejected.write(REJECTION.model_copy(update={"line": 8}))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == REJECTION.model_dump()
    assert [row["line"] for row in rows] == [7, 8]


def test_a_rejection_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    with RejectedFile(path) as rejected:
        rejected.write(REJECTION)
        assert json.loads(path.read_text())["line"] == 7


def test_a_place_that_cannot_hold_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rejected = RejectedFile(tmp_path / "file" / "rejected.jsonl")
    with pytest.raises(StoreError, match="cannot be written: .*name another path"):
        rejected.write(REJECTION)


@pytest.mark.parametrize("name", ["directory", "file/rejected.jsonl"])
def test_a_place_that_cannot_be_cleared_is_a_store_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match="cannot be written"),
        RejectedFile(tmp_path / name) as rejected,
    ):
        rejected.write(REJECTION)


def test_a_full_disk_is_a_store_error(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    with (
        pytest.raises(StoreError, match="No space left on device; free some space"),
        RejectedFile(path) as rejected,
    ):
        path.symlink_to("/dev/full")
        rejected.write(REJECTION)
