"""What a broker has of the house, found out without a change to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import methodcaller

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker

from services.broker.address import BrokerAddress
from services.contracts import topology as names
from services.contracts.errors import BrokerError

_BLOCKED_SECONDS = 10.0


def missing(address: BrokerAddress) -> list[str]:
    """The exchanges and queues of the house that are not there. Raises BrokerError."""
    with _asking(address) as may:
        exchanges = [
            name
            for name in names.HOUSE_EXCHANGES
            if not may(methodcaller("exchange_declare", name, passive=True))
        ]
        queues = [
            name
            for name in names.HOUSE_QUEUES
            if not may(methodcaller("queue_declare", name, passive=True))
        ]
    return exchanges + queues


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
