import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.contracts.errors import StoreError
from services.local.output_dir import locked_output_dir


def test_the_directory_is_created_and_locked(tmp_path: Path) -> None:
    with locked_output_dir(tmp_path / "deep" / "er") as directory:
        assert directory.is_dir()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with (
        locked_output_dir(tmp_path),
        pytest.raises(StoreError, match="another `keepwarm run` is using"),
        locked_output_dir(tmp_path),
    ):
        pass


def test_the_lock_ends_with_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with locked_output_dir(tmp_path):
            pass
    with pytest.raises(RuntimeError), locked_output_dir(tmp_path):
        raise RuntimeError
    with locked_output_dir(tmp_path):
        pass


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(StoreError, match="cannot be used: .*--out"), locked_output_dir(path):
            pass


def test_a_directory_that_this_user_may_not_write_to_is_refused(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    open_dir.chmod(0o555)
    with (
        unprivileged(),
        pytest.raises(StoreError, match="cannot be used: Permission denied"),
        locked_output_dir(open_dir),
    ):
        pass


def test_a_full_disk_is_refused_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    with (
        pytest.raises(StoreError, match="has 5 MiB free, and at least 512 MiB are needed"),
        locked_output_dir(tmp_path),
    ):
        pass
    monkeypatch.undo()
    with locked_output_dir(tmp_path):
        pass
