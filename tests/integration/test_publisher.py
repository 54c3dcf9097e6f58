"""The confirmed publisher, against a real node."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import count

import pytest
from pika.adapters.utils import io_services_utils

from services.broker import BrokerAddress, Consumer, Declares, Outgoing, PrivateNode, Publisher
from services.contracts import Settings, load_settings, topology
from services.contracts.errors import (
    BrokerRefused,
    BrokerUnreachable,
    TopologyMismatch,
)
from tests.integration.conftest import (
    PATIENCE,
    cut,
    delete_queues,
    let_queues_age,
    messages_in,
    plain_connection,
    wait_until,
)
from tests.proxy import Proxy

QUEUE = topology.claims_queue("ctx-test")
DECLARES = Declares("if-missing", ("ctx-test",))


def outgoing(number: int, confirmed: list[int] | None = None) -> Outgoing:
    return Outgoing(
        topology.CLAIMS_EXCHANGE,
        QUEUE,
        f"message {number}".encode(),
        message_id=str(number),
        on_confirmed=None if confirmed is None else lambda: confirmed.append(number),
    )


def take_all(address: BrokerAddress, count: int) -> list[bytes]:
    with Consumer(address, "test", queues=[QUEUE], prefetch=100, declares=DECLARES).open(
        PATIENCE
    ) as consumer:
        bodies = []
        while len(bodies) < count and (delivery := consumer.take(PATIENCE)) is not None:
            bodies.append(delivery.body)
            consumer.acknowledge([delivery])
        return bodies


def test_every_message_is_confirmed_once_and_arrives_in_order(address: BrokerAddress) -> None:
    confirmed: list[int] = []
    with Publisher(address, "test", window=7, declares=DECLARES).open(PATIENCE) as publisher:
        for number in range(500):
            publisher.publish(outgoing(number, confirmed))
        publisher.flush(PATIENCE)
        assert publisher.pending == 0
    assert confirmed == list(range(500))
    assert take_all(address, 500) == [f"message {number}".encode() for number in range(500)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_connection_that_is_reset_before_its_first_use_is_opened_again(
    address: BrokerAddress, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    opened = count()
    connector = io_services_utils._AsyncStreamConnector.__init__
    lost: list[object] = []
    on_lost = Publisher._on_connection_lost

    def reset(*arguments: object, sock: socket.socket, **rest: object) -> None:
        if next(opened) == number:
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        connector(*arguments, sock=sock, **rest)

    def note(publisher: Publisher, connection: object, reason: object) -> None:
        lost.append(reason)
        on_lost(publisher, connection, reason)  # type: ignore[arg-type]

    monkeypatch.setattr(io_services_utils._AsyncStreamConnector, "__init__", reset)
    monkeypatch.setattr(Publisher, "_on_connection_lost", note)
    monkeypatch.setattr("pika.connection.Parameters.DEFAULT_STACK_TIMEOUT", 4)  # not 15 s
    two_ways = replace(address, host="localhost")  # pika tries the other address when it gives up
    confirmed: list[int] = []
    with Publisher(two_ways, "test", window=7, declares=DECLARES).open(PATIENCE) as publisher:
        publisher.publish(outgoing(0, confirmed))
        publisher.flush(PATIENCE)
        cut(publisher)
        publisher.publish(outgoing(1, confirmed))
        publisher.flush(PATIENCE)
        assert "reset right after it was opened" in lost
        connection, before = publisher._connection, next(opened)
        time.sleep(6)  # pika's time-out for what it began is over, and it begins nothing more
        assert (publisher._connection, next(opened)) == (connection, before + 1)
        publisher.publish(outgoing(2, confirmed))
        publisher.flush(PATIENCE)
    assert confirmed == [0, 1, 2]
    assert len(take_all(address, 3)) == 3


def test_publish_waits_while_the_window_is_full(node: PrivateNode, address: BrokerAddress) -> None:
    # A publisher that was never opened confirms nothing: the window is all that it takes.
    publisher = Publisher(address, "test", window=3, declares=DECLARES)
    sent: list[int] = []

    def send() -> None:
        for number in range(5):
            publisher.publish(outgoing(number))
            sent.append(number)

    publisher.raise_if_dead = lambda: None  # type: ignore[method-assign]
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    wait_until(lambda: len(sent) == 3, "three messages handed over")
    thread.join(0.5)
    assert sent == [0, 1, 2]
    with publisher.open(PATIENCE):
        thread.join(PATIENCE)
        publisher.flush(PATIENCE)
    assert sent == [0, 1, 2, 3, 4]
    assert len(take_all(address, 5)) == 5


def test_what_was_unconfirmed_is_sent_again_after_the_connection_was_lost(
    node: PrivateNode, address: BrokerAddress
) -> None:
    with Publisher(address, "test", window=50, declares=DECLARES).open(PATIENCE) as publisher:
        for number in range(300):
            publisher.publish(outgoing(number))
            if number % 100 == 50:
                cut(publisher)
        publisher.flush(PATIENCE)
    bodies = take_all(address, messages_in(node, QUEUE))
    assert set(bodies) == {f"message {number}".encode() for number in range(300)}


def test_a_queue_that_was_deleted_is_declared_again_and_nothing_is_lost(
    node: PrivateNode, address: BrokerAddress
) -> None:
    with Publisher(address, "test", window=50, declares=DECLARES).open(PATIENCE) as publisher:
        publisher.publish(outgoing(1))
        publisher.flush(PATIENCE)
        delete_queues(node, QUEUE)
        publisher.publish(outgoing(2))
        publisher.flush(PATIENCE)
    assert take_all(address, 1) == [b"message 2"]


def test_what_is_published_while_we_close_a_connection_goes_over_the_next(
    address: BrokerAddress,
) -> None:
    with Publisher(address, "test", window=50, declares=DECLARES).open(PATIENCE) as publisher:
        publisher._call_soon(publisher._restart_connection)  # as when no queue takes a message
        publisher.publish(outgoing(1))
        publisher.flush(PATIENCE)
    assert take_all(address, 1) == [b"message 1"]


def test_a_wrong_password_is_refused_at_once_with_the_next_step(broker: Settings) -> None:
    wrong = broker.model_copy(update={"broker_password": type(broker.broker_password)("wrong")})
    with pytest.raises(BrokerRefused, match="KEEPWARM_BROKER_PASSWORD"):
        Publisher(BrokerAddress.from_settings(wrong), "test", window=1).open(PATIENCE)


def test_an_unknown_virtual_host_is_refused(broker: Settings) -> None:
    elsewhere = broker.model_copy(update={"broker_url": f"{broker.broker_url}elsewhere"})
    with pytest.raises(BrokerRefused, match="elsewhere"):
        Publisher(BrokerAddress.from_settings(elsewhere), "test", window=1).open(PATIENCE)


def test_a_broker_that_is_not_there_is_named_after_the_time_out(broker: Settings) -> None:
    nowhere = broker.model_copy(update={"broker_url": "amqp://keepwarm@127.0.0.1:9/"})
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:9"):
        Publisher(BrokerAddress.from_settings(nowhere), "test", window=1).open(1)


def test_a_queue_with_other_arguments_is_a_mismatch_with_the_remedy(
    node: PrivateNode, address: BrokerAddress
) -> None:
    connection = plain_connection(node)
    connection.channel().queue_declare(QUEUE, durable=True)  # a classic queue
    connection.close()
    with pytest.raises(TopologyMismatch, match="delete that queue"):
        Publisher(address, "test", window=1, declares=DECLARES).open(PATIENCE)


def test_publishing_on_a_closed_link_says_so(address: BrokerAddress) -> None:
    publisher = Publisher(address, "test", window=1, declares=DECLARES).open(PATIENCE)
    publisher.close()
    with pytest.raises(BrokerUnreachable, match="closed"):
        publisher.publish(outgoing(1))


def test_a_publish_that_waits_for_the_window_fails_when_the_link_closes_despite_an_alarm(
    node: PrivateNode, address: BrokerAddress
) -> None:
    publisher = Publisher(address, "test", window=1, declares=DECLARES).open(PATIENCE)
    node.control("set_vm_memory_high_watermark", "absolute", "1000000")
    try:
        # A node blocks a connection that publishes after the alarm has reached it.
        wait_until(lambda: (publisher.offer(outgoing(1)), publisher.blocked_by)[1], "the alarm")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(publisher.publish, outgoing(2))
            wait([waiting], timeout=0.5)
            assert not waiting.done()
            publisher.close()
            with pytest.raises(BrokerUnreachable, match="closed"):
                waiting.result(PATIENCE)
    finally:
        node.control("set_vm_memory_high_watermark", "0.4")


def test_messages_outlive_the_node(tmp_path, broker: Settings) -> None:
    with PrivateNode(tmp_path / "node") as own:
        settings = broker.model_copy(
            update={
                "broker_url": own.url,
                "broker_password": type(broker.broker_password)(own.password),
            }
        )
        address = BrokerAddress.from_settings(settings)
        with Publisher(address, "test", window=50, declares=DECLARES).open(PATIENCE) as publisher:
            for number in range(20):
                publisher.publish(outgoing(number))
            publisher.flush(PATIENCE)
            let_queues_age(time.monotonic())
            own._node.kill()
            publisher.publish(outgoing(20))
            own.start()
            publisher.flush(PATIENCE)
        assert messages_in(own, QUEUE) == 21


def test_what_is_only_offered_never_waits(node: PrivateNode, address: BrokerAddress) -> None:
    with Proxy(node.port) as proxy:
        through = replace(address, port=proxy.port)
        with Publisher(through, "test", window=2, declares=DECLARES).open(PATIENCE) as publisher:
            proxy.black_hole()  # nothing is confirmed, and nobody is told
            assert [publisher.offer(outgoing(number)) for number in range(4)] == [
                *(True, True, False, False)
            ]
            proxy.heal()
            publisher.flush(PATIENCE)
            assert publisher.offer(outgoing(4))
            publisher.flush(PATIENCE)
        assert not publisher.offer(outgoing(5))
    assert len(take_all(address, 3)) == 3


@pytest.fixture
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNode]:
    """A node whose password may be changed."""
    with PrivateNode(tmp_path_factory.mktemp("guarded") / "node") as running:
        yield running


def test_a_broker_that_refuses_us_for_long_ends_the_link_and_one_that_is_away_does_not(
    guarded: PrivateNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bear_refusals(seconds: float) -> None:
        monkeypatch.setattr("services.broker.link._REFUSED_SECONDS", seconds)

    bear_refusals(3.0)
    settings = load_settings(broker_url=guarded.url, broker_password=guarded.password)
    address = BrokerAddress.from_settings(settings)

    def change_password(password: str) -> None:
        guarded.control("change_password", "keepwarm", password)
        guarded.control("close_all_connections", "the password was changed")

    with (
        Publisher(address, "test", window=1, declares=DECLARES).open(PATIENCE) as publisher,
        Consumer(address, "test", queues=[topology.VERDICTS_QUEUE], prefetch=1).open(
            PATIENCE
        ) as consumer,
    ):
        guarded.stop()
        time.sleep(5)  # for longer than a refusal is borne
        guarded.start()
        wait_until(lambda: publisher.connected and consumer.connected, "both connected again")
        bear_refusals(PATIENCE)  # the commands that end it take seconds
        change_password("for a moment")
        wait_until(lambda: publisher._refused_since, "a refusal")
        change_password(guarded.password)
        wait_until(lambda: publisher.connected and consumer.connected, "both connected again")
        bear_refusals(3.0)
        change_password("for good")

        def refused() -> bool:
            publisher.offer(outgoing(0))
            return not (publisher._thread.is_alive() or consumer._thread.is_alive())

        wait_until(refused, "the end of both")
        with pytest.raises(BrokerRefused, match="refused us: .* Check the user, the password"):
            publisher.publish(outgoing(0))
        with pytest.raises(BrokerRefused, match="refused us: .* Check the user, the password"):
            consumer.take(1)
