"""Weights are fetched by a process of its own, with the hub's real client."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.contexts.fetching import fetch
from services.contracts import ContextSpec
from services.contracts.errors import ModelError
from services.models import hub

GENEROUS_SECONDS = 60.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = ContextSpec(model="org/model", revision=COMMIT)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def never() -> bool:
    return False


def test_a_directory_is_where_it_is(tmp_path: Path) -> None:
    assert fetch(ContextSpec(model=str(tmp_path)), {}, never) == tmp_path


def test_what_was_fetched_before_is_found_in_the_cache_of_whoever_asks(
    tmp_path: Path, offline: dict[str, str]
) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert fetch(SPEC, offline, never) == snapshot


def test_the_cause_of_a_failed_fetch_is_reported_with_the_next_step(
    offline: dict[str, str],
) -> None:
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set, and the model is not in the"):
        fetch(SPEC, offline, never)


@pytest.fixture
def silent_hub() -> Iterator[socket.socket]:
    """Takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(GENEROUS_SECONDS)
        yield listener


def test_a_fetch_that_is_stopped_ends_immediately_and_leaves_no_process(
    tmp_path: Path, silent_hub: socket.socket
) -> None:
    stop = threading.Event()
    endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    got: list[Path | None] = []
    fetching = threading.Thread(target=lambda: got.append(fetch(SPEC, environment, stop.is_set)))
    fetching.start()
    connection, _ = silent_hub.accept()
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    client = [
        process
        for process in psutil.process_iter(["cmdline"])  # None for one that ends just now
        if process.pid in ours and "org/model" in str(process.info["cmdline"])
    ]
    stop.set()
    began = time.monotonic()
    fetching.join(GENEROUS_SECONDS)
    connection.close()
    assert got == [None]
    assert time.monotonic() - began < 9  # the client would have waited for 10 s
    assert client and not psutil.wait_procs(client, timeout=GENEROUS_SECONDS)[1]


class Ended(BaseException):
    pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    def end(_: int) -> None:
        raise Ended

    monkeypatch.setattr(hub, "_answer", lambda kind, value: said.append(f"{kind}: {value}"))
    monkeypatch.setattr(hub.os, "_exit", end)
    monkeypatch.setattr(hub, "_PROGRESS_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(hub, "_STALLED_SECONDS", 1.0)
    return said


def test_a_download_that_stands_still_is_given_up_and_one_that_moves_is_not(
    tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    grown: list[float] = []

    def size(_: Path) -> int:
        if len(grown) < 40:  # twice as long as it may stand still
            grown.append(time.monotonic())
        return len(grown)

    monkeypatch.setattr(hub, "_size", size)
    with pytest.raises(Ended):
        hub._end_if_stalled(SPEC)
    assert len(grown) == 40
    (said,) = answers
    assert said.startswith("error: the download of 'org/model' makes no progress: nothing was")
    assert str(blobs) in said and "--model PATH" in said
