"""How a keeper is started, waited for and asked; what it then does is in test_keeper.py."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.contexts import keeper_client
from services.contracts import load_settings
from services.contracts.errors import KeeperError
from services.node.runtime_dir import keeper_lock, keeper_socket, take_lock

GENEROUS_SECONDS = 60.0

Keepers = Callable[[str], None]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(directory))
    monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(keeper_client, "_RETRY_SECONDS", 0.0)
    return directory


@pytest.fixture
def keepers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keepers]:
    """`keepers("sleep 600")`: what those that are started do instead of keeping."""

    def do(script: str) -> None:
        script = f"echo $$ >>{directory / 'started'}; {script}"
        monkeypatch.setattr(keeper_client, "_COMMAND", ("sh", "-c", script))

    starts = count()
    start = keeper_client._start

    def counted(*arguments: Any) -> Any:
        next(starts)
        return start(*arguments)

    monkeypatch.setattr(keeper_client, "_start", counted)
    yield do
    expected = next(starts)
    deadline = time.monotonic() + GENEROUS_SECONDS
    while len(started(directory)) < expected:  # one may not even have begun
        assert time.monotonic() < deadline, "what was started never began"
        time.sleep(0.01)
    for pid in started(directory):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def started(directory: Path) -> list[int]:
    file = directory / "started"
    return list(map(int, file.read_text().split())) if file.exists() else []


def test_a_keeper_that_is_slow_to_come_is_waited_for_and_no_other_is_started(
    keepers: Keepers, directory: Path
) -> None:
    keepers("exec sleep 600")
    looks = count()
    assert keeper_client.open_keeper(load_settings(), lambda: next(looks) > 50) is None
    assert len(started(directory)) <= 1


def test_one_that_never_answers_is_not_waited_for_without_end(
    keepers: Keepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_SLOW_START_SECONDS", 0.0)
    keepers("exec sleep 600")
    with pytest.raises(KeeperError, match="no keeper answers"):
        keeper_client.open_keeper(load_settings())


def test_one_that_ended_is_started_again(
    keepers: Keepers, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 60.0)
    keepers("exit 1")
    assert keeper_client.open_keeper(load_settings(), lambda: len(started(directory)) > 2) is None


def test_a_keeper_that_cannot_start_is_reported_with_its_last_output(
    keepers: Keepers, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_RETRY_SECONDS", 60.0)
    keepers("echo no room >&2; exit 1")
    with pytest.raises(KeeperError, match="no room"):
        keeper_client.open_keeper(load_settings())
    assert len(started(directory)) == 1


def test_while_another_has_the_lock_none_is_started(
    keepers: Keepers, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keepers("exec sleep 600")
    lock = take_lock(keeper_lock(directory))
    assert lock is not None
    looks = count()

    def there() -> bool:
        if next(looks) == 20:
            assert not started(directory)
            monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 60.0)
            os.close(lock)
        return bool(started(directory))

    assert keeper_client.open_keeper(load_settings(), there) is None
    assert next(looks) > 20


def test_a_run_waits_for_the_end_of_another_keeper_and_then_starts_its_own(
    directory: Path, tmp_path: Path
) -> None:
    # As right after `kill -9` of a run: its keeper still stops its engine.
    lock = take_lock(keeper_lock(directory))
    assert lock is not None
    looks = count()

    def look() -> bool:
        if next(looks) == 200:
            os.close(lock)
        return False

    log_file = tmp_path / "keeper.log"
    with keeper_client.temporary_keeper(load_settings(), log_file, look):
        assert next(looks) > 200
        channel = keeper_client.connect(directory)
        assert channel is not None
        channel.close()
    assert keeper_client.connect(directory) is None
    assert "has a keeper already" not in log_file.read_text()


def test_a_run_starts_its_keeper_again_when_it_ended(
    keepers: Keepers, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 60.0)
    keepers("exit 1")
    with keeper_client.temporary_keeper(
        load_settings(), tmp_path / "keeper.log", lambda: len(started(directory)) > 2
    ):
        assert len(started(directory)) > 2


def test_a_keeper_that_ends_without_an_answer_is_reported_with_its_last_line_alone(
    keepers: Keepers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_RETRY_SECONDS", 60.0)
    keepers("echo first; echo no room >&2; exit 1")
    with (
        pytest.raises(KeeperError, match="no room") as raised,
        keeper_client.temporary_keeper(load_settings(), tmp_path / "keeper.log"),
    ):
        pass
    assert "first" not in str(raised.value)


def test_another_keeper_that_does_not_end_is_reported_as_such(
    keepers: Keepers, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_SLOW_START_SECONDS", 0.2)
    keepers("exec sleep 600")
    lock = take_lock(keeper_lock(directory))
    assert lock is not None
    with (
        pytest.raises(KeeperError, match="may still be stopping its engines"),
        keeper_client.temporary_keeper(load_settings(), tmp_path / "keeper.log"),
    ):
        pass
    os.close(lock)
    assert not started(directory)


# What a node's engines are.


@contextmanager
def listening(directory: Path, answers: Callable[[socket.socket], None]) -> Iterator[None]:
    """A process at the keeper's socket that does `answers` with each connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(keeper_socket(directory)))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        answers(connection)

        serving = threading.Thread(target=serve)
        serving.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        serving.join(GENEROUS_SECONDS)


def test_without_a_keeper_there_are_no_engines_and_none_is_started(directory: Path) -> None:
    assert keeper_client.engines(directory) == ()
    assert not list(directory.iterdir())


def test_the_socket_of_a_killed_keeper_has_no_engines(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(keeper_socket(directory)))
    assert keeper_client.engines(directory) == ()


def test_a_keeper_that_ends_while_it_is_asked_has_no_engines(directory: Path) -> None:
    def end(connection: socket.socket) -> None:
        keeper_socket(directory).unlink(missing_ok=True)

    with listening(directory, end):
        assert keeper_client.engines(directory) == ()


def test_a_keeper_that_does_not_know_the_request_is_reported_as_of_another_version(
    directory: Path,
) -> None:
    # What keepers of the version before do: they close the connection.
    with (
        listening(directory, lambda connection: connection.recv(65_536) and None),
        pytest.raises(KeeperError, match="another version of Keepwarm; .*evict --all"),
    ):
        keeper_client.engines(directory)


def test_a_keeper_that_does_not_answer_is_an_error_with_the_next_step(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(keeper_socket(directory)))
        hung.listen()
        with pytest.raises(KeeperError, match="did not answer within 0.1 s; see keeper.log"):
            keeper_client.engines(directory, 0.1)
