"""Why there is no connection; the rest of a link is shown on a real broker."""

import socket
from collections.abc import Iterator

import pytest
import structlog
from pika.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    StreamLostError,
)

from services.broker import Consumer
from services.broker.address import BrokerAddress
from services.contracts import load_settings
from services.contracts.errors import BrokerRefused, BrokerUnreachable
from tests.unit.broker.conftest import unopened

LOST = StreamLostError("Stream connection lost: ConnectionResetError(104, 'reset by peer')")
CLOSED = ConnectionClosedByBroker(403, "ACCESS_REFUSED - Login was refused")


@pytest.fixture
def link() -> Iterator[Consumer]:
    with unopened("runs") as made:
        yield made


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("PLAIN"),
        CLOSED,
        ConnectionClosedByBroker(530, "NOT_ALLOWED - vhost other not found"),
        ProbableAuthenticationError(repr(CLOSED)),
        AMQPConnectionError(ProbableAccessDeniedError(repr(CLOSED))),
    ],
)
def test_a_broker_that_says_so_has_refused_us(link: Consumer, error: Exception) -> None:
    assert isinstance(link._explain(error), BrokerRefused)


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        ProbableAuthenticationError(repr(LOST)),
        AMQPConnectionError(ProbableAccessDeniedError(repr(LOST))),
        ConnectionClosedByBroker(320, "CONNECTION_FORCED - shutdown"),
        "reset as soon as it was there",
    ],
)
def test_a_connection_that_ends_early_is_no_refusal(link: Consumer, error: Exception | str) -> None:
    explained = link._explain(error)
    assert isinstance(explained, BrokerUnreachable)
    assert "Check that it is running and that the address is right" in str(explained)


@pytest.mark.parametrize(
    ("missing", "levels"),
    [(False, ["info", "warning", "warning"]), (True, ["info", "info", "info"])],
)
def test_a_loss_is_a_warning_only_when_the_next_attempt_fails_as_well(
    missing: bool, levels: list[str], link: Consumer
) -> None:
    link._core_is_missing = missing
    with structlog.testing.capture_logs() as events:
        for _ in levels:
            link._on_connection_lost(None, LOST)
    assert [(each["event"], each["log_level"]) for each in events] == [
        ("broker.waiting", level) for level in levels
    ]


def test_a_link_can_be_closed_while_the_broker_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}"
        address = BrokerAddress.from_settings(load_settings(broker_url=url))
        link = Consumer(address, "silent", queues=["runs"], prefetch=1)
        with structlog.testing.capture_logs() as events:
            with pytest.raises(BrokerUnreachable, match="nothing answered"):
                link.open(timeout_seconds=0.3)
            link._thread.join(10)
    assert not link._thread.is_alive()
    assert [each["event"] for each in events] == []
    assert link._error is None
