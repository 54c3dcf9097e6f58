"""What was compiled is handed from an engine's first start to others of its kind."""

import os
import stat
from pathlib import Path

import pytest

from services.contexts import compiled
from services.contexts.caches import EngineCaches

FIRST, SECOND, THIRD = "ctx-01-abcd", "ctx-02-abcd", "ctx-03-abcd"
OTHER_KIND = "ctx-02-ffff"


@pytest.fixture
def caches(tmp_path: Path) -> EngineCaches:
    return EngineCaches(tmp_path / "cache")


def start(caches: EngineCaches, name: str, **kernels: str) -> dict[str, str]:
    """Compile these; what was there before."""
    with caches.starting(name) as directory:
        found = {path.name: path.read_text() for path in directory.glob("*/*/*")}
        for kernel, text in kernels.items():
            place = directory / compiled.INDUCTOR / "k"
            place.mkdir(parents=True, exist_ok=True)
            (place / kernel).write_text(text)
    return found


def test_an_engine_begins_with_what_another_of_its_kind_compiled(caches: EngineCaches) -> None:
    assert start(caches, FIRST, add="x+y") == {}
    assert start(caches, SECOND, mul="x*y") == {"add": "x+y"}
    assert start(caches, THIRD) == {"add": "x+y", "mul": "x*y"}
    assert start(caches, FIRST) == {"add": "x+y"}  # its own is its own


def test_another_kind_of_engine_begins_with_nothing(caches: EngineCaches) -> None:
    start(caches, FIRST, add="x+y")
    assert start(caches, OTHER_KIND) == {}


def test_a_later_engine_writes_into_no_other_ones_directory(
    caches: EngineCaches, tmp_path: Path
) -> None:
    start(caches, FIRST, add="x+y")
    start(caches, SECOND, add="something else")
    assert (tmp_path / "cache" / FIRST / compiled.INDUCTOR / "k" / "add").read_text() == "x+y"


def test_of_a_start_that_failed_nothing_is_handed_on(caches: EngineCaches) -> None:
    with pytest.raises(ConnectionError), caches.starting(FIRST) as directory:
        (directory / compiled.TRITON / "k").mkdir(parents=True)
        (directory / compiled.TRITON / "k" / "half").write_text("x")
        raise ConnectionError
    assert start(caches, SECOND) == {}


def test_what_a_killed_keeper_left_unfinished_is_no_hindrance(
    caches: EngineCaches, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / "compiled-abcd.new" / compiled.INDUCTOR / "k"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    assert start(caches, FIRST, add="x+y") == {}
    assert start(caches, SECOND) == {"add": "x+y"}


def test_what_has_grown_too_large_is_handed_on_no_more(
    caches: EngineCaches, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(caches, FIRST, add="x+y")
    monkeypatch.setattr(compiled, "_MOST_BYTES", 10)
    start(caches, SECOND, mul="12345678")
    assert start(caches, THIRD, mul="small") == {}
    assert start(caches, "ctx-04-abcd") == {"mul": "small"}


def test_an_engine_starts_without_what_cannot_be_copied(
    caches: EngineCaches, tmp_path: Path
) -> None:
    start(caches, FIRST, add="x+y")
    shared = tmp_path / "cache" / "compiled-abcd" / compiled.INDUCTOR
    (shared / "dangling").symlink_to("nowhere")
    assert start(caches, SECOND, mul="x*y") == {}
    assert start(caches, THIRD) == {"mul": "x*y"}


def test_it_is_for_its_owner_alone(caches: EngineCaches, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        start(caches, FIRST, add="x+y")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache" / "compiled-abcd").stat().st_mode) == 0o700
