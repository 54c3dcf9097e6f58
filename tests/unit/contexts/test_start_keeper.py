"""How a keeper is started and waited for; what it then does is in test_keeper.py."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.contexts import start_keeper
from services.contracts import load_settings
from services.contracts.errors import KeeperError
from services.node.runtime_dir import keeper_lock, take_lock

GENEROUS_SECONDS = 60.0

Keepers = Callable[[str], None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "run"
    place.mkdir()
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(place))
    monkeypatch.setattr(start_keeper, "_ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(start_keeper, "_RETRY_SECONDS", 0.0)
    return place


@pytest.fixture
def keepers(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keepers]:
    """`keepers("sleep 600")`: what those that are started do instead of keeping."""

    def do(script: str) -> None:
        script = f"echo $$ >>{place / 'started'}; {script}"
        monkeypatch.setattr(start_keeper, "_COMMAND", ("sh", "-c", script))

    starts = count()
    start = start_keeper._start

    def counted(*arguments: Any) -> Any:
        next(starts)
        return start(*arguments)

    monkeypatch.setattr(start_keeper, "_start", counted)
    yield do
    expected = next(starts)
    deadline = time.monotonic() + GENEROUS_SECONDS
    while len(started(place)) < expected:  # one may not even have begun
        assert time.monotonic() < deadline, "what was started never began"
        time.sleep(0.01)
    for pid in started(place):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def started(place: Path) -> list[int]:
    file = place / "started"
    return list(map(int, file.read_text().split())) if file.exists() else []


def test_a_keeper_that_is_slow_to_come_is_waited_for_and_no_other_is_started(
    keepers: Keepers, place: Path
) -> None:
    keepers("exec sleep 600")
    looks = count()
    assert start_keeper.open_keeper(load_settings(), lambda: next(looks) > 50) is None
    assert len(started(place)) <= 1


def test_one_that_never_answers_is_not_waited_for_without_end(
    keepers: Keepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_keeper, "_SLOW_START_SECONDS", 0.0)
    keepers("exec sleep 600")
    with pytest.raises(KeeperError, match="no keeper answers"):
        start_keeper.open_keeper(load_settings())


def test_one_that_ended_is_started_again(
    keepers: Keepers, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_keeper, "_ANSWER_SECONDS", 60.0)
    keepers("exit 1")
    assert start_keeper.open_keeper(load_settings(), lambda: len(started(place)) > 2) is None


def test_a_keeper_that_cannot_start_is_reported_with_its_last_output(
    keepers: Keepers, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_keeper, "_RETRY_SECONDS", 60.0)
    keepers("echo no room >&2; exit 1")
    with pytest.raises(KeeperError, match="no room"):
        start_keeper.open_keeper(load_settings())
    assert len(started(place)) == 1


def test_while_another_has_the_lock_none_is_started(
    keepers: Keepers, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keepers("exec sleep 600")
    lock = take_lock(keeper_lock(place))
    assert lock is not None
    looks = count()

    def there() -> bool:
        if next(looks) == 20:
            assert not started(place)
            monkeypatch.setattr(start_keeper, "_ANSWER_SECONDS", 60.0)
            os.close(lock)
        return bool(started(place))

    assert start_keeper.open_keeper(load_settings(), there) is None
    assert next(looks) > 20


def test_a_run_waits_for_the_end_of_another_keeper_and_then_starts_its_own(
    place: Path, tmp_path: Path
) -> None:
    # As right after `kill -9` of a run: its keeper still stops its engine.
    lock = take_lock(keeper_lock(place))
    assert lock is not None
    looks = count()

    def look() -> bool:
        if next(looks) == 200:
            os.close(lock)
        return False

    log_file = tmp_path / "keeper.log"
    with start_keeper.temporary_keeper(load_settings(), log_file, look):
        assert next(looks) > 200
        channel = start_keeper.connected(place)
        assert channel is not None
        channel.close()
    assert start_keeper.connected(place) is None
    assert "has a keeper already" not in log_file.read_text()


def test_a_run_starts_its_keeper_again_when_it_ended(
    keepers: Keepers, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_keeper, "_ANSWER_SECONDS", 60.0)
    keepers("exit 1")
    with start_keeper.temporary_keeper(
        load_settings(), tmp_path / "keeper.log", lambda: len(started(place)) > 2
    ):
        assert len(started(place)) > 2


def test_a_keeper_that_ends_without_an_answer_is_reported_with_its_last_line_alone(
    keepers: Keepers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_keeper, "_RETRY_SECONDS", 60.0)
    keepers("echo first; echo no room >&2; exit 1")
    with (
        pytest.raises(KeeperError, match="no room") as raised,
        start_keeper.temporary_keeper(load_settings(), tmp_path / "keeper.log"),
    ):
        pass
    assert "first" not in str(raised.value)


def test_another_keeper_that_does_not_end_is_reported_as_such(
    keepers: Keepers, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_keeper, "_SLOW_START_SECONDS", 0.2)
    keepers("exec sleep 600")
    lock = take_lock(keeper_lock(place))
    assert lock is not None
    with (
        pytest.raises(KeeperError, match="may still be stopping its engines"),
        start_keeper.temporary_keeper(load_settings(), tmp_path / "keeper.log"),
    ):
        pass
    os.close(lock)
    assert not started(place)
