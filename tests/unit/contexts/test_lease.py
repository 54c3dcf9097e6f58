"""A worker's side of its lease, where the keeper is not what it should be."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.contexts import keeper_client
from services.contexts import lease as module
from services.contexts.lease import EngineLease
from services.contexts.plan import EnginePlan
from services.contexts.protocol import (
    ContextRecord,
    DescribeDevice,
    KeeperChannel,
    KeeperReply,
    State,
)
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineStartError, KeeperError
from services.node.device import Device

GENEROUS_SECONDS = 60.0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def lease(context: ContextSpec) -> EngineLease:
    plan = EnginePlan.of(context, Device("cpu", "Xeon", 2**34, (0, 1)), load_settings())
    return EngineLease(plan, load_settings())


@pytest.fixture
def _died(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that took our connection, and died."""

    def connect(*_: object) -> KeeperChannel:
        ours, its = socket.socketpair(socket.AF_UNIX)
        its.close()
        return KeeperChannel(ours)

    monkeypatch.setattr(keeper_client, "connect", connect)
    monkeypatch.setattr(module, "open_keeper", connect)


@pytest.mark.usefixtures("_died")
def test_a_keeper_that_has_just_died_is_reported_in_words(lease: EngineLease) -> None:
    assert keeper_client.evict(load_settings(), ("ctx-1",)) == ()
    assert keeper_client.drain(load_settings()) == ()
    with pytest.raises(KeeperError, match="keeper's socket is gone"):
        lease.start(threading.Event())
    assert not lease.alive
    lease.close()


@pytest.mark.usefixtures("_died")
def test_an_engine_that_hangs_is_let_go_though_its_keeper_cannot_be_asked(
    lease: EngineLease,
) -> None:
    lease.stop()
    assert not lease.alive


def test_who_evicts_waits_for_as_long_as_a_drain_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def ask(_: KeeperChannel, __: object, seconds: float, ___: object) -> KeeperReply:
        waits.append(seconds)
        return KeeperReply()

    one, other = socket.socketpair(socket.AF_UNIX)
    monkeypatch.setattr(keeper_client, "connect", lambda _: KeeperChannel(one))
    monkeypatch.setattr(KeeperChannel, "ask", ask)
    keeper_client.drain(load_settings(grace_seconds=600))
    # Workers have 60 % of it to finish, and the engines then all of it to end.
    assert waits[0] > 1.6 * 600
    other.close()


class Mute:
    """A keeper that accepts connections and sends only what the test sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[KeeperChannel] = []
        monkeypatch.setattr(keeper_client, "connect", lambda _: self.connect())
        monkeypatch.setattr(module, "open_keeper", lambda *_: self.connect())

    def connect(self) -> KeeperChannel:
        ours, its = map(KeeperChannel, socket.socketpair(socket.AF_UNIX))
        self.ends.append(its)
        return ours

    def send_record(self, record: ContextRecord) -> None:
        self.ends[0].send(KeeperReply(record=record))


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mute]:
    keeper = Mute(monkeypatch)
    yield keeper
    for end in keeper.ends:
        end.close()


@contextmanager
def starting(lease: EngineLease) -> Iterator[threading.Event]:
    """It starts on another thread, until the block ends. Yields what makes it stop."""
    stop = threading.Event()
    thread = threading.Thread(target=lease.start, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(GENEROUS_SECONDS)
        lease.close()
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def record_of(lease: EngineLease, state: State) -> ContextRecord:
    return ContextRecord(
        name="e",
        context=lease.plan.spec,
        device="Xeon",
        state=state,
        socket="s",
        log="l",
        since=0.0,
        last_used=0.0,
    )


def test_who_asks_whether_it_is_alive_does_not_wait_for_its_start(
    lease: EngineLease, mute: Mute
) -> None:
    with starting(lease):
        wait_for(lambda: mute.ends)
        for state in ("starting", "warm"):
            assert not lease.alive
            mute.send_record(record_of(lease, state))
        wait_for(lambda: lease.alive)


@pytest.mark.parametrize(("memory", "reason"), [(False, "engine-ended"), (True, "out-of-memory")])
def test_why_an_engine_starts_again_is_known_until_it_is_warm(
    memory: bool, reason: str, lease: EngineLease, mute: Mute
) -> None:
    assert lease.restart_reason is None
    with starting(lease):
        wait_for(lambda: mute.ends)
        mute.send_record(record_of(lease, "starting"))
        assert not lease.alive and lease.restart_reason is None  # it is the first start
        mute.send_record(record_of(lease, "warm"))
        wait_for(lambda: lease.starts)
        mute.ends[0].send(KeeperReply(error="it ended", out_of_memory=memory))
        assert not lease.alive and lease.restart_reason == reason
    with starting(lease):
        wait_for(lambda: len(mute.ends) == 2)
        mute.ends[1].send(KeeperReply(record=record_of(lease, "starting")))
        assert not lease.alive and lease.restart_reason == reason
        mute.ends[1].send(KeeperReply(record=record_of(lease, "warm")))
        wait_for(lambda: lease.alive)
        assert lease.restart_reason is None


def test_a_lease_knows_whether_its_engine_ran_out_of_memory_until_the_next_start(
    lease: EngineLease, mute: Mute, monkeypatch: pytest.MonkeyPatch
) -> None:
    for memory in (True, False):

        def ended(*_: object, memory: bool = memory) -> KeeperChannel:
            ours = mute.connect()
            mute.ends[-1].send(KeeperReply(error="it ended (exit code 1)", out_of_memory=memory))
            return ours

        monkeypatch.setattr(module, "open_keeper", ended)
        with pytest.raises(EngineStartError, match="it ended"):
            lease.start(threading.Event())
        assert lease.ran_out_of_memory is memory


def test_a_keeper_that_hangs_is_not_waited_for(
    lease: EngineLease, mute: Mute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEEPER_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(keeper_client, "_REQUEST_SECONDS", 0.2)
    with pytest.raises(KeeperError, match="did not answer within 0.2 s"):
        lease.start(threading.Event())
    assert isinstance(mute.ends[1].request(0), DescribeDevice)


def test_a_keeper_without_news_that_answers_is_waited_for(
    lease: EngineLease, mute: Mute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEEPER_SILENCE_SECONDS", 0.2)
    answered: list[object] = []

    def ask(_: KeeperChannel, request: object, *__: object) -> KeeperReply:
        answered.append(request)
        return KeeperReply()

    monkeypatch.setattr(KeeperChannel, "ask", ask)
    with starting(lease):
        deadline = time.monotonic() + GENEROUS_SECONDS
        while len(answered) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_end_of_a_keeper_names_the_kernels_kill_for_memory(
    lease: EngineLease, mute: Mute, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([1])
    monkeypatch.setattr(module, "oom_kills", lambda: next(kills, 2))
    with pytest.raises(EngineStartError, match="its keeper ended. .* because memory ran out"):
        monkeypatch.setattr(KeeperChannel, "send", lambda *_: mute.ends[0].close())
        lease.start(threading.Event())
    assert lease.ran_out_of_memory
