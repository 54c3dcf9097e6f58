"""A consumer that no broker is needed for."""

from collections.abc import Iterator
from contextlib import contextmanager

from services.broker import BrokerAddress, Consumer
from services.contracts import load_settings


@contextmanager
def unopened(queue: str, *, prefetch: int = 1, max_bytes: int | None = None) -> Iterator[Consumer]:
    """One that was never opened."""
    address = BrokerAddress.from_settings(load_settings(broker_url="amqp://localhost"))
    made = Consumer(address, "test", queues=[queue], prefetch=prefetch, max_bytes=max_bytes)
    try:
        yield made
    finally:
        made._loop.close()
