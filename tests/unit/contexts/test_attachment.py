"""A worker's side of its lease, where the keeper is not what it should be."""

import socket
import threading
from pathlib import Path

import pytest

from services.contexts import Device, attachment
from services.contexts.attachment import Attachment
from services.contexts.plan import EnginePlan
from services.contexts.protocol import Line, Word
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import KeeperError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def lease(context: ContextSpec) -> Attachment:
    plan = EnginePlan.of(context, Device("cpu", "Xeon", 2**34, (0, 1)), load_settings())
    return Attachment(plan, load_settings())


@pytest.fixture
def _died(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that took our connection, and died."""

    def connected(*_: object) -> Line:
        ours, its = socket.socketpair(socket.AF_UNIX)
        its.close()
        return Line(ours)

    monkeypatch.setattr(attachment, "connected", connected)
    monkeypatch.setattr(attachment, "open_keeper", connected)


@pytest.mark.usefixtures("_died")
def test_a_keeper_that_has_just_died_is_told_in_words(lease: Attachment) -> None:
    with pytest.raises(KeeperError, match="keeper's socket is gone"):
        attachment.evict(load_settings(), ("ctx-1",))
    with pytest.raises(KeeperError, match="keeper's socket is gone"):
        attachment.drain(load_settings())
    with pytest.raises(KeeperError, match="keeper's socket is gone"):
        lease.start(threading.Event())
    assert not lease.alive
    lease.close()


@pytest.mark.usefixtures("_died")
def test_an_engine_that_hangs_is_let_go_though_its_keeper_cannot_be_asked(
    lease: Attachment,
) -> None:
    lease.stop()
    assert not lease.alive


def test_who_evicts_waits_for_as_long_as_a_drain_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def ask(_: Line, __: object, seconds: float) -> Word:
        waits.append(seconds)
        return Word()

    one, other = socket.socketpair(socket.AF_UNIX)
    monkeypatch.setattr(attachment, "connected", lambda _: Line(one))
    monkeypatch.setattr(Line, "ask", ask)
    attachment.drain(load_settings(grace_seconds=600))
    # Workers have 60 % of it to finish, and the engines then all of it to end.
    assert waits[0] > 1.6 * 600
    other.close()
