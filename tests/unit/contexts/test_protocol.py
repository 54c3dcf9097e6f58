"""What is said between workers and keepers, over a real socket."""

import json
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from services.contexts import protocol
from services.contexts.plan import EnginePlan
from services.contexts.protocol import (
    Attach,
    ContextRecord,
    Demand,
    DescribeDevice,
    Drain,
    Evict,
    KeeperChannel,
    KeeperReply,
    Request,
    Status,
)
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import KeeperError
from services.node.device import Device

GENEROUS_SECONDS = 30.0


class Ends:
    """Both ends of a connection, one of them bare."""

    def __init__(self) -> None:
        self.bare, other = socket.socketpair(socket.AF_UNIX)
        self.channel = KeeperChannel(other)


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.bare.close()
    both.channel.close()


def plan(context: ContextSpec) -> EnginePlan:
    return EnginePlan.of(context, Device("cpu", "Xeon", 2**34, (0, 1)), load_settings())


def test_every_request_survives_the_way(ends: Ends, context: ContextSpec) -> None:
    wanted = plan(context)
    said: list[Request] = [
        Attach(plan=wanted),
        Demand(claims={context.context_id: 7}),
        DescribeDevice(),
        Status(),
        Evict(wanted=("ctx-1", "ctx-2")),
        Drain(),
    ]
    keeper = KeeperChannel(ends.bare)
    for request in said:
        ends.channel.send(request)
    assert [keeper.request(GENEROUS_SECONDS) for _ in said] == said


def test_a_plan_that_came_over_the_socket_is_the_same_engine(
    ends: Ends, context: ContextSpec
) -> None:
    ends.channel.send(Attach(plan=plan(context)))
    heard = KeeperChannel(ends.bare).request(GENEROUS_SECONDS)
    assert isinstance(heard, Attach) and heard.plan.name == plan(context).name


def starting(context: ContextSpec) -> ContextRecord:
    return ContextRecord(
        name="ctx-1-2",
        context=context,
        device="Xeon",
        state="starting",
        progress="Loading weights: 50 %",
        socket="/run/e.sock",
        log="/run/e.log",
        since=1.5,
        last_used=2.5,
    )


def test_every_reply_survives_the_way(ends: Ends, context: ContextSpec) -> None:
    record = starting(context)
    said = [
        KeeperReply(record=record, warm=True),
        KeeperReply(error="it ended\nwith a log"),
        KeeperReply(done=("a", "b")),
        KeeperReply(engines=(record, record.model_copy(update={"name": "ctx-1-3"}))),
        KeeperReply(device=Device("cuda", "H100", 2**36, (0, 1), gpu="0")),
    ]
    for reply in said:
        ends.channel.send(reply)
    keeper = KeeperChannel(ends.bare)
    assert [keeper.reply(GENEROUS_SECONDS) for _ in said] == said


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"hello",
        b"{}",
        b'{"verb": "reboot"}',
        b'{"verb": "attach"}',
        b'{"verb": "drain", "now": true}',
        b'{"verb": "demand", "claims": {"ctx-1": -1}}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_request_is_refused(ends: Ends, nonsense: bytes) -> None:
    ends.bare.sendall(nonsense + b"\n")
    with pytest.raises(KeeperError, match="not a request"):
        ends.channel.request(GENEROUS_SECONDS)


def test_fields_of_a_newer_keeper_are_ignored(ends: Ends, context: ContextSpec) -> None:
    record = starting(context)
    newer = {**json.loads(record.model_dump_json()), "mood": "good"}
    ends.bare.sendall(json.dumps({"engines": [newer], "mood": "good"}).encode() + b"\n")
    assert ends.channel.reply(GENEROUS_SECONDS) == KeeperReply(engines=(record,))


def test_a_word_of_another_version_tells_how_to_be_rid_of_that_keeper(ends: Ends) -> None:
    ends.bare.sendall(b'{"warm": "very"}\n')
    with pytest.raises(KeeperError, match="another version of Keepwarm; .*evict --all"):
        ends.channel.reply(GENEROUS_SECONDS)


def test_a_line_without_end_is_broken_off(ends: Ends) -> None:
    ends.bare.setblocking(False)
    with pytest.raises(KeeperError, match="more than 1,048,576 bytes"):
        while True:
            try:
                ends.bare.send(b"x" * 65_536)
            except BlockingIOError:
                try:
                    ends.channel.request(0)
                except TimeoutError:
                    continue


def test_a_side_that_is_gone_is_no_error(ends: Ends) -> None:
    ends.bare.sendall(b'{"verb": "dr')  # in the midst of a word
    ends.bare.close()
    assert ends.channel.request(GENEROUS_SECONDS) is None
    assert ends.channel.reply(GENEROUS_SECONDS) is None


def test_a_side_that_was_reset_is_no_error(ends: Ends) -> None:
    ends.channel.send(Drain())
    ends.bare.close()  # with something unread: the kernel resets the connection
    assert ends.channel.request(GENEROUS_SECONDS) is None


@pytest.mark.parametrize("seconds", [0, 0.05])
def test_silence_is_a_timeout_and_what_has_come_is_kept(ends: Ends, seconds: float) -> None:
    ends.bare.sendall(b'{"verb": ')
    with pytest.raises(TimeoutError):
        ends.channel.request(seconds)
    ends.bare.sendall(b'"drain"}\n')
    assert ends.channel.request(GENEROUS_SECONDS) == Drain()


def test_another_users_end_is_refused(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    one, other = socket.socketpair(socket.AF_UNIX)
    with pytest.raises(KeeperError, match="belongs to another user"):
        KeeperChannel(one)
    assert one.fileno() == -1  # closed
    other.close()


def test_the_kernel_reports_the_user_of_the_other_end(ends: Ends) -> None:
    raw = ends.bare.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    assert struct.unpack("3i", raw)[:2] == (os.getpid(), os.geteuid())


def test_a_plan_shows_no_environment(context: ContextSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    wanted = plan(context)
    assert wanted.environment["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in repr(Attach(plan=wanted))


def test_sending_to_a_closed_connection_is_an_error(ends: Ends) -> None:
    ends.bare.close()
    with pytest.raises(KeeperError, match="other end of the keeper's socket is gone"):
        ends.channel.send(Drain())


def test_sending_to_a_peer_that_does_not_read_is_an_error(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_SEND_SECONDS", 0.1)
    with pytest.raises(KeeperError, match="timed out"):
        for _ in range(100):
            ends.channel.send(Evict(wanted=("ctx-1",) * 10_000))


def test_a_request_gets_its_answer_or_an_error(ends: Ends) -> None:
    ends.bare.sendall(b'{"done": ["a"]}\n')
    assert ends.channel.ask(Drain(), GENEROUS_SECONDS) == KeeperReply(done=("a",))
    with pytest.raises(KeeperError, match="did not answer within 0.1 s"):
        ends.channel.ask(Drain(), 0.1)


def test_who_asks_a_keeper_that_has_just_ended_has_no_answer(ends: Ends) -> None:
    ends.bare.close()
    assert ends.channel.ask(Status(), GENEROUS_SECONDS) is None


def test_a_request_that_is_stopped_waits_no_longer(ends: Ends) -> None:
    assert ends.channel.ask(Drain(), GENEROUS_SECONDS, lambda: True) is None


def test_it_is_known_when_the_other_side_has_hung_up(ends: Ends) -> None:
    assert not ends.channel.is_closed
    ends.bare.sendall(b'{"verb": "drain"}\n')
    ends.bare.close()
    assert not ends.channel.is_closed  # it has said something before
    assert ends.channel.request(GENEROUS_SECONDS) == Drain()
    assert ends.channel.is_closed
