"""The output directory of `keepwarm run`, also on a network file system, and its lock."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from services.cli import output_dir
from services.cli.output_dir import locked_output_dir, working_dir
from services.cli.screen import Screen
from services.cli.stores import STORE_FILE, network_store_warning
from services.contracts import Run, load_settings
from services.contracts.errors import StoreError
from services.store import Incoming, Store, run_status


class Partition(NamedTuple):
    mountpoint: str
    fstype: str


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on Lustre, and one for temporary files on a local disk."""
    out = tmp_path / "scratch" / "out"
    out.mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    mounted(monkeypatch, tmp_path / "scratch")
    return out


def mounted(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    mounts = [Partition("/", "ext4"), *(Partition(str(place), "lustre") for place in places)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)


def said(screen: Screen) -> str:
    return screen.file.getvalue()


def stored(place: Path) -> Store:
    return Store.open(load_settings(store_url=str(place / STORE_FILE)))


def test_on_a_local_disk_a_run_works_in_its_output_directory(
    tmp_path: Path, screen: Screen
) -> None:
    with working_dir(tmp_path, screen) as place:
        assert place == tmp_path
    assert said(screen) == ""


def test_on_a_network_file_system_it_works_on_a_local_disk_with_a_message(
    out: Path, tmp_path: Path, screen: Screen, incoming: Incoming, run: Run
) -> None:
    with working_dir(out, screen) as place:
        assert place.is_relative_to(tmp_path / "tmp")
        with stored(place) as store:
            store.write(incoming)
        assert not (out / STORE_FILE).exists()
    assert f"{out} is on lustre: the store and RabbitMQ's data are in {place}" in said(screen)
    assert not place.exists()
    with stored(out) as store:
        assert run_status(store, run.run_id) is not None


def test_the_same_command_goes_on_with_the_store_that_was_copied_back(
    out: Path, screen: Screen, incoming: Incoming, run: Run
) -> None:
    with stored(out) as store:
        store.write(incoming)
    for _ in range(2):
        with working_dir(out, screen) as place, stored(place) as store:
            assert run_status(store, run.run_id) is not None


def test_what_a_killed_run_left_on_the_local_disk_is_used(
    out: Path, screen: Screen, incoming: Incoming, run: Run
) -> None:
    stored(out).close()
    with working_dir(out, screen) as place:
        pass
    place.mkdir()
    with stored(place) as store:
        store.write(incoming)
    with working_dir(out, screen) as again, stored(again) as store:
        assert again == place
        assert run_status(store, run.run_id) is not None


@pytest.mark.parametrize("why", ["shared", "full"])
def test_without_space_on_a_local_disk_it_works_in_place_with_a_warning(
    why: str, out: Path, tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "shared":
        mounted(monkeypatch, tmp_path)
    else:
        monkeypatch.setattr(output_dir, "_free_bytes", lambda _: 0)
    with working_dir(out, screen) as place:
        assert place == out
    assert "Warning" in said(screen) and "Name a local directory in TMPDIR" in said(screen)


def test_a_store_that_cannot_be_copied_back_stays_on_the_local_disk(
    out: Path, screen: Screen
) -> None:
    with (
        pytest.raises(StoreError, match="cannot be copied to .*free some space"),
        working_dir(out, screen) as place,
    ):
        stored(place).close()
        (out / STORE_FILE).mkdir()
    assert (place / STORE_FILE).exists()


def test_a_store_that_was_put_on_a_network_file_system_is_warned_of(
    out: Path, tmp_path: Path
) -> None:
    def warning(place: object) -> str | None:
        return network_store_warning(load_settings(store_url=str(place)))

    assert f"the store sqlite:///{out}/s.sqlite is on lustre" in (warning(out / "s.sqlite") or "")
    assert warning(tmp_path / "s.sqlite") is None
    assert warning("postgresql://u@localhost/d") is None


# Its lock.


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
