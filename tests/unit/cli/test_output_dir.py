import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.cli.output_dir import held_output_dir
from services.contracts.errors import StoreError


def test_the_directory_is_made_and_held(tmp_path: Path) -> None:
    with held_output_dir(tmp_path / "deep" / "er") as directory:
        assert directory.is_dir()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with (
        held_output_dir(tmp_path),
        pytest.raises(StoreError, match="another `keepwarm run` works in"),
        held_output_dir(tmp_path),
    ):
        pass


def test_after_its_end_the_directory_is_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        with held_output_dir(tmp_path):
            pass
    with pytest.raises(RuntimeError), held_output_dir(tmp_path):
        raise RuntimeError
    with held_output_dir(tmp_path):
        pass


def test_what_can_be_no_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(StoreError, match="cannot be used: .*--out"), held_output_dir(place):
            pass


def test_a_directory_that_this_user_may_not_write_to_is_told(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    open_dir.chmod(0o555)
    with (
        unprivileged(),
        pytest.raises(StoreError, match="cannot be used: Permission denied"),
        held_output_dir(open_dir),
    ):
        pass


def test_a_full_disk_is_told_before_anything_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    with (
        pytest.raises(StoreError, match="has 5 MiB left, and at least 512 MiB are needed"),
        held_output_dir(tmp_path),
    ):
        pass
    monkeypatch.undo()
    with held_output_dir(tmp_path):
        pass
