"""Which of Keepwarm's exchanges a broker has, and which this user may publish to. Read-only."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import methodcaller

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from services.broker.address import BrokerAddress
from services.contracts import topology
from services.contracts.errors import BrokerError

_BLOCKED_SECONDS = 10.0


def missing_exchanges(address: BrokerAddress) -> list[str]:
    """Those of Keepwarm's exchanges that do not exist. Raises BrokerError."""
    with _asking(address) as may:
        return [
            name
            for name in topology.CORE_EXCHANGES
            if not may(methodcaller("exchange_declare", name, passive=True))
        ]


def writable_exchanges(address: BrokerAddress) -> set[str]:
    """The direct exchanges that this user may publish to; all must exist. Raises BrokerError.

    The broker checks the permission before it looks for a queue. The routing key matches no queue,
    so an empty message is returned. Fanout exchanges are left out: they ignore the routing key, and
    every listener would receive the message.
    """
    key = f"keepwarm-doctor-{secrets.token_hex(8)}"
    with _asking(address) as may:
        return {name for name in topology.DIRECT_EXCHANGES if may(partial(_publish, name, key))}


def _publish(exchange: str, key: str, channel: BlockingChannel) -> None:
    channel.confirm_delivery()
    with suppress(UnroutableError):
        channel.basic_publish(exchange, key, b"", mandatory=True)


@contextmanager
def _asking(
    address: BrokerAddress,
) -> Iterator[Callable[[Callable[[BlockingChannel], object]], bool]]:
    """A function that tells whether the broker accepts an operation, each on its own channel."""
    parameters = address.parameters("keepwarm doctor")
    parameters.blocked_connection_timeout = _BLOCKED_SECONDS

    def may(ask: Callable[[BlockingChannel], object]) -> bool:
        channel = connection.channel()
        try:
            ask(channel)
        except ChannelClosedByBroker:
            return False
        channel.close()
        return True

    try:
        with pika.BlockingConnection(parameters) as connection:
            yield may
    except AMQPError as error:
        raise BrokerError(
            f"the broker at {address} accepted us and then failed: {error!r}; see its log"
        ) from error
