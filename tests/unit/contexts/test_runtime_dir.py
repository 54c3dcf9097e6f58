import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from services.contexts.runtime_dir import engine_logs, open_runtime_dir, socket_path
from services.contracts.errors import UsageError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = open_runtime_dir(tmp_path / "deep" / "er")
    assert directory.is_dir()
    assert mode(directory) == 0o700


def test_a_directory_of_ours_that_is_too_open_is_closed(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir(mode=0o777)
    (tmp_path / "runtime").chmod(0o777)
    assert mode(open_runtime_dir(tmp_path / "runtime")) == 0o700


def test_opening_it_again_keeps_what_is_in_it(tmp_path: Path) -> None:
    directory = open_runtime_dir(tmp_path / "runtime")
    (directory / "engine.log").write_text("said")
    assert (open_runtime_dir(directory) / "engine.log").read_text() == "said"


def test_a_strangers_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir(mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match=r"KEEPWARM_RUNTIME_DIR: .* this user's own; name another"):
        open_runtime_dir(tmp_path / "runtime")
    assert mode(tmp_path / "runtime") == 0o755


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_is_refused_for_a_stranger_could_have_laid_it(target: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runtime").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match="KEEPWARM_RUNTIME_DIR"):
        open_runtime_dir(tmp_path / "runtime")


def test_a_file_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "runtime").write_text("")
    with pytest.raises(UsageError, match="KEEPWARM_RUNTIME_DIR: cannot make .*name another"):
        open_runtime_dir(tmp_path / "runtime")


def test_a_place_where_nothing_may_be_made_is_told(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    open_dir.chmod(0o555)
    with unprivileged(), pytest.raises(UsageError, match="cannot make .*Permission denied"):
        open_runtime_dir(open_dir / "runtime")


@pytest.mark.parametrize(("character", "size"), [("x", 1), ("é", 2)])
def test_a_sockets_path_is_bounded_in_bytes(character: str, size: int) -> None:
    directory = Path("/run")
    room = 107 - len("/run/") - len(".sock")
    name = character * (room // size) + "x" * (room % size)
    assert len(os.fsencode(socket_path(directory, name))) == 107
    with pytest.raises(UsageError, match="longer than the 107 bytes .* name a shorter directory"):
        socket_path(directory, name + "x")


def test_only_plain_files_of_this_user_are_an_engines_logs(tmp_path: Path) -> None:
    (tmp_path / "ctx-0011-2233.log").write_text("RuntimeError: out of memory")
    for name in ("keeper.log", "template-00.log", "ctx-0011-2233.json", "ctx-0011-x.log"):
        (tmp_path / name).touch()
    (tmp_path / "ctx-0022-2233.log").symlink_to(tmp_path / "keeper.log")
    (tmp_path / "ctx-0033-2233.log").mkdir()
    if os.geteuid() == 0:
        (tmp_path / "ctx-0044-2233.log").touch()
        os.chown(tmp_path / "ctx-0044-2233.log", 65534, 65534)
    assert engine_logs(tmp_path) == [tmp_path / "ctx-0011-2233.log"]
