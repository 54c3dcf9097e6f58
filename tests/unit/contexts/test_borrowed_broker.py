"""A keeper lends its broker: to whom, until when, and what becomes of it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.contexts.borrowed_broker import borrow_broker, warm_broker
from services.contexts.keeper import Keeper
from services.contexts.keeper_server import Broker, KeeperServer
from services.contexts.protocol import KeeperReply, KeptBroker
from services.contracts import Settings, load_settings
from services.contracts.errors import BrokerError

GENEROUS_SECONDS = 60.0


@dataclass(frozen=True)
class Node:
    url: str = "amqp://keepwarm@127.0.0.1:12345/"
    password: str = "a secret"


@dataclass
class Recorder:
    """A broker that remembers what is done with it."""

    node: Node | None = field(default_factory=Node)
    exists: bool = True
    done: list[object] = field(default_factory=list)

    def acquire(self) -> Node | None:
        return self.node

    def restart_if_down(self) -> None:
        self.done.append("looked after")

    def release(self, claims_queue: str | None) -> None:
        self.done.append(("taken back", claims_queue))

    def discard(self) -> None:
        self.done.append("thrown away")

    def end_if_idle(self) -> None:
        pass

    def close(self) -> None:
        self.done.append("closed")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("KEEPWARM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KEEPWARM_START_KEEPER", "false")
    return load_settings()


@pytest.fixture
def serve(settings: Settings) -> Iterator[Callable[[Broker | None], None]]:
    """`serve(broker)`: a keeper of this node that keeps this broker."""
    started: list[tuple[KeeperServer, threading.Thread]] = []

    def start(broker: Broker | None) -> None:
        server = KeeperServer(Keeper(settings), until_idle=False, broker=broker)
        serving = threading.Thread(target=server.serve)
        serving.start()
        started.append((server, serving))
        path = settings.runtime_dir / "keeper.sock"
        deadline = time.monotonic() + GENEROUS_SECONDS
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    yield start
    for server, serving in started:
        server.stop()
        serving.join(GENEROUS_SECONDS)


Serve = Callable[[Broker | None], None]


def wait_for(recorder: Recorder, what: object) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while what not in recorder.done:
        assert time.monotonic() < deadline, recorder.done
        time.sleep(0.01)


def test_a_broker_is_borrowed_and_given_back(serve: Serve, settings: Settings) -> None:
    recorder = Recorder()
    serve(recorder)
    borrowed = borrow_broker(settings)
    assert borrowed is not None and not borrowed.ended
    assert (borrowed.url, borrowed.password) == (Node().url, Node().password)
    wait_for(recorder, "looked after")
    borrowed.give_back("claims.ctx-1")
    borrowed.close()
    wait_for(recorder, ("taken back", "claims.ctx-1"))
    assert "thrown away" not in recorder.done


def test_a_broker_whose_borrower_goes_without_a_word_is_thrown_away(
    serve: Serve, settings: Settings
) -> None:
    recorder = Recorder()
    serve(recorder)
    borrowed = borrow_broker(settings)
    assert borrowed is not None
    borrowed.close()
    wait_for(recorder, "thrown away")


def test_a_broker_is_made_ready_for_the_next(serve: Serve, settings: Settings) -> None:
    recorder = Recorder()
    serve(recorder)
    warm_broker(settings, lambda: False)
    wait_for(recorder, ("taken back", None))


class Broken(Recorder):
    def acquire(self) -> Node | None:
        raise BrokerError("rabbitmq-server is not installed")


@pytest.mark.parametrize("broker", [None, Recorder(node=None), Broken()])
def test_where_the_keeper_has_no_broker_there_is_none(
    broker: Recorder | None, serve: Serve, settings: Settings
) -> None:
    serve(broker)
    assert borrow_broker(settings) is None


def test_without_a_keeper_there_is_none(settings: Settings) -> None:
    assert borrow_broker(settings) is None


def test_who_finds_the_socket_of_a_keeper_can_connect_to_it(
    serve: Serve, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that finds it too early starts a broker of its own, and loses seconds."""
    found_too_early = []

    class Slow(socket.socket):
        def listen(self, backlog: int = 1) -> None:
            found_too_early.append((settings.runtime_dir / "keeper.sock").exists())
            super().listen(backlog)

    monkeypatch.setattr("services.contexts.keeper_server.socket.socket", Slow)
    serve(None)
    assert found_too_early == [False]


def test_the_broker_ends_with_its_keeper(settings: Settings) -> None:
    recorder = Recorder()
    server = KeeperServer(Keeper(settings), until_idle=False, broker=recorder)
    server.stop()
    server.serve()
    assert recorder.done == ["closed"]


def test_the_password_is_in_no_text_form_of_what_is_lent() -> None:
    lent = KeptBroker(url=Node().url, password=SecretStr(Node().password))
    assert Node().password not in repr(lent) + str(KeeperReply(broker=lent))
    assert Node().password in lent.model_dump_json()  # for the borrower, on the keeper's socket
