import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from services.contracts.errors import UsageError
from services.node.runtime_dir import (
    MAX_LOG_BYTES,
    bound_logs,
    engine_logs,
    log_tail,
    open_log,
    open_runtime_dir,
    socket_path,
)


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


def test_a_file_at_its_path_is_reported(tmp_path: Path) -> None:
    (tmp_path / "runtime").write_text("")
    with pytest.raises(UsageError, match="KEEPWARM_RUNTIME_DIR: cannot make .*name another"):
        open_runtime_dir(tmp_path / "runtime")


def test_a_directory_without_write_permission_is_reported(
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
    for name in ("keeper.log", "fork-server-00.log", "ctx-0011-2233.json", "ctx-0011-x.log"):
        (tmp_path / name).touch()
    (tmp_path / "ctx-0022-2233.log").symlink_to(tmp_path / "keeper.log")
    (tmp_path / "ctx-0033-2233.log").mkdir()
    if os.geteuid() == 0:
        (tmp_path / "ctx-0044-2233.log").touch()
        os.chown(tmp_path / "ctx-0044-2233.log", 65534, 65534)
    assert engine_logs(tmp_path) == [tmp_path / "ctx-0011-2233.log"]


LOGS = ("ctx-0a-11.log", "keeper.log", "rabbitmq.log", "fork-server-1.log")


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_grows_too_large_is_cut_while_it_is_written(tmp_path: Path, name: str) -> None:
    with open_log(tmp_path / name) as log:
        for number in range(MAX_LOG_BYTES // 1_000 + 100):
            log.write(b"%-999d\n" % number)
        log.flush()
        bound_logs(tmp_path, {"ctx-0a-11"})
        log.write(b"and on\n")
        log.flush()
        lines = (tmp_path / name).read_bytes().splitlines()
        assert (tmp_path / name).stat().st_size < MAX_LOG_BYTES / 10
        assert b"bytes before this line were dropped" in lines[0]
        whole = [int(line) for line in lines[1:-1]]  # no line was cut in two
        assert whole == [*range(whole[0], MAX_LOG_BYTES // 1_000 + 100)]
        assert lines[-1] == b"and on"
        bound_logs(tmp_path, {"ctx-0a-11"})
        assert (tmp_path / name).read_bytes().splitlines() == lines


@pytest.mark.parametrize(
    ("text", "end", "left"),
    [
        (b"x" * MAX_LOG_BYTES, b"RuntimeError: the last words", b""),
        (b"x" * MAX_LOG_BYTES + b"\r 50%", b"\r100%\nthe last words\n", b"100%"),
        (b"%-999d\r" % 7 * (MAX_LOG_BYTES // 1_000 + 1), b"the last words", b"\n7  "),
    ],
)
def test_of_a_log_without_line_ends_the_last_bytes_are_kept(
    tmp_path: Path, text: bytes, end: bytes, left: bytes
) -> None:
    path = tmp_path / "ctx-0a-11.log"
    path.write_bytes(text + end)
    bound_logs(tmp_path, {"ctx-0a-11"})
    kept = path.read_bytes()
    assert 900_000 < len(kept) < 1_100_000
    assert kept.endswith(end) and left in kept
    assert b"bytes before this line were dropped" in kept.splitlines()[0]
    assert "the last words" in log_tail(path)[-1]


def test_the_end_of_a_long_line_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"x" * 10_000_000 + b"the last words")
    (shown,) = log_tail(log)
    assert len(shown) == 600 and shown.endswith("xthe last words")


def test_of_engines_that_are_gone_the_latest_logs_stay(tmp_path: Path) -> None:
    for number in range(40):
        log = tmp_path / f"ctx-{number:02x}-11.log"
        log.write_text("said")
        os.utime(log, (number, number))
    bound_logs(tmp_path, {"ctx-00-11"})
    kept = {int(log.stem.split("-")[1], 16) for log in engine_logs(tmp_path)}
    assert kept == {0, *range(8, 40)}


def test_a_link_among_logs_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "large"
    theirs.write_bytes(b"x\n" * MAX_LOG_BYTES)
    (tmp_path / "keeper.log").symlink_to(theirs)
    bound_logs(tmp_path, set())
    assert theirs.stat().st_size == 2 * MAX_LOG_BYTES
