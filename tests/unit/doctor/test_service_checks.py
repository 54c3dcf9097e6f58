"""The checks of SQLite stores; the integration tests have those of a broker and of PostgreSQL."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from services.contracts import load_settings
from services.contracts.errors import StoreError
from services.doctor.findings import Finding
from services.doctor.service_checks import store
from services.store import Store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A store."""
    path = tmp_path / "store.sqlite"
    Store.open(load_settings(store_url=str(path))).close()
    return path


def check(file: Path) -> Finding:
    return store(load_settings(store_url=str(file)))


def execute(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        for statement in statements:
            database.execute(statement)


def contents(file: Path) -> tuple[list[tuple[str, ...]], list[tuple[int, ...]], str]:
    """The store's tables and indexes, its versions, and its journal mode."""
    with closing(sqlite3.connect(file)) as database:
        return (
            database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall(),
            database.execute("SELECT version FROM keepwarm_schema").fetchall(),
            database.execute("PRAGMA journal_mode").fetchone()[0],
        )


def test_a_store_that_does_not_exist_is_not_created(tmp_path: Path) -> None:
    found = check(tmp_path / "other.sqlite")
    assert (found.level, "does not exist yet" in found.message) == ("ok", True)
    assert not (tmp_path / "other.sqlite").exists()


def test_a_store_is_ok(file: Path) -> None:
    found = check(file)
    assert (found.level, "does not exist yet" in found.message) == ("ok", False)


def test_a_file_that_is_no_store_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite"
    file.write_bytes(b"not a database, whatever its name is" * 100)
    with pytest.raises(StoreError):
        check(file)


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_store_of_an_older_version_is_left_unchanged(file: Path, mode: str) -> None:
    execute(
        file,
        f"PRAGMA journal_mode = {mode}",
        "DROP TABLE verdict_counts",
        "DROP INDEX outcomes_dead",
        "UPDATE keepwarm_schema SET version = 3",
    )
    before = contents(file)
    found = check(file)
    assert found.level == "warning"
    assert "version 3, which the next collector upgrades" in found.message
    assert contents(file) == before
    assert before[1:] == ([(3,)], mode)


def test_a_store_that_can_be_read_but_not_written_is_an_error(file: Path) -> None:
    refuse = "BEGIN SELECT RAISE(ABORT, 'the trigger refuses'); END"
    execute(file, f"CREATE TRIGGER no BEFORE INSERT ON keepwarm_schema {refuse}")
    with pytest.raises(StoreError, match="the trigger refuses"):
        check(file)


def test_an_empty_file_stays_empty(tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite"
    file.touch()
    assert "empty, the collector creates its tables" in check(file).message
    assert file.stat().st_size == 0 and [*tmp_path.glob("store.sqlite?*")] == []


def test_a_store_of_a_newer_version_is_an_error(file: Path) -> None:
    execute(file, "UPDATE keepwarm_schema SET version = 99")
    with pytest.raises(StoreError, match="has schema version 99"):
        check(file)


def test_a_directory_that_this_user_may_not_write_to_is_an_error(
    open_dir: Path, unprivileged: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # This user may not run the test run's interpreter.
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", "/bin/false")
    with unprivileged(), pytest.raises(StoreError, match="SQLite writes files beside"):
        check(open_dir / "store.sqlite")


def test_a_network_file_system_is_an_error(
    mounted: Callable[[Path, str], None], tmp_path: Path
) -> None:
    mounted(tmp_path, "nfs4")
    with pytest.raises(StoreError, match="on nfs4, where SQLite can lose data"):
        check(tmp_path / "store.sqlite")
