"""Compile caches: one directory an engine, without what is half-written, and never shared."""

import os
import stat
import time
from pathlib import Path

import pytest

from services.contexts.caches import EngineCaches, PastStart
from services.contracts.errors import EngineStartError, UsageError
from services.contracts.startup import StartupPhases

NAME = "ctx-0011-2233"


def test_what_a_finished_start_wrote_is_there_at_the_next(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    with caches.starting(NAME) as directory:
        (directory / "kernel").write_text("compiled")
    with caches.starting(NAME) as again:
        assert again == directory
        assert (again / "kernel").read_text() == "compiled"


def test_what_a_broken_off_start_left_is_thrown_away(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    with pytest.raises(ConnectionError), caches.starting(NAME) as directory:
        (directory / "kernel").write_text("compi")
        raise ConnectionError
    with caches.starting(NAME) as directory:
        assert not (directory / "kernel").exists()


def broken_off(caches: EngineCaches, error: type[Exception] = ConnectionError) -> None:
    """A start that adds to what is there, changes some of it, and does not come to its end."""
    with pytest.raises(error), caches.starting(NAME) as directory:
        (directory / "vllm" / "index").write_text("hal")
        (directory / "vllm" / "new").mkdir()
        (directory / "vllm" / "new" / "kernel").write_text("compi")
        os.utime(directory / "vllm" / "new" / "kernel", (0, 0))  # as in a copy of something old
        raise error("told to stop")


@pytest.fixture
def grown(tmp_path: Path) -> EngineCaches:
    """The caches of an engine that has started well before."""
    caches = EngineCaches(tmp_path / "cache")
    with caches.starting(NAME) as directory:
        (directory / "vllm").mkdir()
        for name in ("kernel", "index"):
            (directory / "vllm" / name).write_text("whole")
    caches.save_start(NAME, PastStart(phases=StartupPhases(total=21.0), memory_bytes=2**31))
    time.sleep(0.05)  # the file system's clock is coarse
    return caches


def test_a_start_that_is_given_up_leaves_what_earlier_ones_compiled(grown: EngineCaches) -> None:
    for _ in range(2):
        broken_off(grown)
    assert grown.last_start(NAME) is not None
    with grown.starting(NAME) as directory:
        assert sorted(path.name for path in (directory / "vllm").iterdir()) == ["kernel"]
        assert (directory / "vllm" / "kernel").read_text() == "whole"
    assert grown.last_start(NAME) is not None


def test_a_start_that_fails_leaves_nothing_compiled_and_is_remembered_all_the_same(
    grown: EngineCaches,
) -> None:
    broken_off(grown, EngineStartError)
    with grown.starting(NAME) as directory:
        assert not (directory / "vllm").exists()
    assert grown.last_start(NAME) is not None


# The clock of awake_seconds() has a thread.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_what_a_killed_keeper_left_is_thrown_away(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    pid = os.fork()
    if pid == 0:
        with caches.starting(NAME) as directory:
            (directory / "kernel").write_text("compi")
            os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / "cache" / NAME / "kernel").exists()
    with caches.starting(NAME) as directory:
        assert not (directory / "kernel").exists()


def test_a_directory_that_somebody_deleted_is_made_again(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with caches.starting(NAME) as directory:
        assert directory.is_dir()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_of_two_starts_of_one_engine_the_second_gets_no_cache(tmp_path: Path) -> None:
    first, second = EngineCaches(tmp_path / "cache"), EngineCaches(tmp_path / "cache")
    assert not second.is_starting(NAME)
    with first.starting(NAME) as directory:
        assert directory is not None
        assert second.is_starting(NAME)
        with second.starting(NAME) as other:
            assert other is None
        assert (directory / "unfinished").exists()  # whose start is not over
    assert not second.is_starting(NAME)
    with second.starting(NAME) as directory:
        assert directory is not None


def test_starts_of_two_engines_do_not_wait_for_each_other(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    with caches.starting(NAME) as one, caches.starting("ctx-other") as other:
        assert one != other


def test_the_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    with caches.starting(NAME) as directory:
        for path in (directory, directory.parent):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 65534, 65534)
    with pytest.raises(UsageError, match="KEEPWARM_CACHE_DIR: .* not a directory of this user's"):
        EngineCaches(tmp_path / "cache")


def test_a_start_is_remembered_beyond_its_keeper(tmp_path: Path) -> None:
    past = PastStart(phases=StartupPhases(imports=9.5, total=21.0), memory_bytes=2**31)
    caches = EngineCaches(tmp_path / "cache")
    with caches.starting(NAME):
        pass
    caches.save_start(NAME, past)
    assert EngineCaches(tmp_path / "cache").last_start(NAME) == past
    with caches.starting(NAME):
        assert caches.last_start(NAME) == past


@pytest.mark.parametrize(
    ("imports", "fetch", "seconds"),
    [(None, None, 400.0), (0.0, None, 400.0), (30.0, None, 370.0), (30.0, 300.0, 100.0)],
)
def test_bringing_an_engine_back_takes_neither_its_imports_nor_its_fetch(
    imports: float | None, fetch: float | None, seconds: float
) -> None:
    phases = StartupPhases(imports=imports, fetch=fetch, total=400.0)
    assert PastStart(phases=phases, memory_bytes=1).restart_seconds == seconds


@pytest.mark.parametrize("nonsense", [b"", b"{", b"\xff\xfe", b'{"memory_bytes": "much"}', b"[]"])
def test_a_memory_that_makes_no_sense_is_none(tmp_path: Path, nonsense: bytes) -> None:
    caches = EngineCaches(tmp_path / "cache")
    assert caches.last_start(NAME) is None
    with caches.starting(NAME) as directory:
        (directory / "startup.json").write_bytes(nonsense)
    assert caches.last_start(NAME) is None


# What is old, and what is too much.

DAY = 86_400


def filled(
    caches: EngineCaches, directory: Path, name: str, size: int, unused_days: float = 0
) -> None:
    with caches.starting(name) as own:
        (own / "triton").mkdir()
        (own / "triton" / "kernel").write_bytes(b"x" * size)
    age(directory / "cache" / name, unused_days)


def age(directory: Path, days: float) -> None:
    then = time.time() - days * DAY
    for path in (*directory.rglob("*"), directory):
        os.utime(path, (then, then))


def names(caches: EngineCaches) -> list[str]:
    return [cache.name for cache in caches.find()]


def test_caches_are_found_with_their_size_the_longest_unused_first(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    filled(caches, tmp_path, "ctx-0a-11", 10, unused_days=2)
    filled(caches, tmp_path, "ctx-0b-11", 20, unused_days=9)
    filled(caches, tmp_path, "ctx-0c-11", 30)
    (tmp_path / "cache" / "not-ours").mkdir()
    found = [
        (each.name, each.size_bytes, round(each.unused_seconds / DAY)) for each in caches.find()
    ]
    assert found == [("ctx-0b-11", 20, 9), ("ctx-0a-11", 10, 2), ("ctx-0c-11", 30, 0)]


def test_a_start_makes_a_cache_used_again(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    filled(caches, tmp_path, NAME, 10, unused_days=90)
    with caches.starting(NAME):
        pass
    caches.save_start(NAME, PastStart(phases=StartupPhases(total=2.0)))
    (found,) = caches.find()
    assert found.unused_seconds < DAY


def test_a_cache_whose_engine_starts_just_now_stays(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    filled(caches, tmp_path, NAME, 10)
    (found,) = caches.find()
    with caches.starting(NAME):
        assert not caches.remove(found)
    assert caches.remove(found)
    assert names(caches) == []
    with caches.starting(NAME) as directory:
        assert list(directory.iterdir()) == [directory / "unfinished"]


def test_what_a_killed_removal_left_is_removed(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    (tmp_path / "cache" / f"{NAME}.removed" / "triton").mkdir(parents=True)
    assert names(caches) == []
    assert not (tmp_path / "cache" / f"{NAME}.removed").exists()


def test_the_longest_unused_go_until_the_rest_fits_and_those_in_use_stay(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    for number, days in enumerate((40, 30, 20, 10)):
        filled(caches, tmp_path, f"ctx-0{number}-11", 100, unused_days=days)
    caches.bound(400, set())
    assert len(names(caches)) == 4
    caches.bound(250, {"ctx-00-11"})
    assert names(caches) == ["ctx-00-11", "ctx-03-11"]


def test_the_data_of_a_node_go_only_when_no_node_can_be_at_it(tmp_path: Path) -> None:
    caches = EngineCaches(tmp_path / "cache")
    node = tmp_path / "cache" / "rabbitmq-00112233"
    node.mkdir()
    (node / "data").write_bytes(b"x" * 100)
    caches.bound(0, set())
    assert names(caches) == ["rabbitmq-00112233"]
    age(node, 2)
    caches.bound(0, set())
    assert names(caches) == []
