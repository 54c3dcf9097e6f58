"""What a broker has of the house, found out without a change to it."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import methodcaller

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from services.broker.address import BrokerAddress
from services.contracts import topology as names
from services.contracts.errors import BrokerError

_BLOCKED_SECONDS = 10.0


def missing_exchanges(address: BrokerAddress) -> list[str]:
    """Those of the house that are not there. Raises BrokerError."""
    with _asking(address) as may:
        return [
            name
            for name in names.HOUSE_EXCHANGES
            if not may(methodcaller("exchange_declare", name, passive=True))
        ]


def writable(address: BrokerAddress) -> set[str]:
    """The direct exchanges, all of them there, that this user may publish to. Raises BrokerError.

    The broker asks for the right before it looks for a queue, and the key is no queue's: an empty
    message comes back. A fanout has no keys: whoever listens there would hear it.
    """
    key = f"keepwarm-doctor-{secrets.token_hex(8)}"
    with _asking(address) as may:
        return {name for name in names.DIRECT_EXCHANGES if may(partial(_publish, name, key))}


def _publish(exchange: str, key: str, channel: BlockingChannel) -> None:
    channel.confirm_delivery()
    with suppress(UnroutableError):
        channel.basic_publish(exchange, key, b"", mandatory=True)


@contextmanager
def _asking(
    address: BrokerAddress,
) -> Iterator[Callable[[Callable[[BlockingChannel], object]], bool]]:
    """Whether the broker does what it is asked for; a channel that it closes is of no more use."""
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
            f"the broker at {address} took us and then did not answer: {error!r}; see its log"
        ) from error
