"""The only package that speaks AMQP: topology, publisher with confirms, consumer with drain."""

from services.broker.address import BrokerAddress
from services.broker.consumer import Consumer
from services.broker.declarations import Declares
from services.broker.delivery import Delivery
from services.broker.private_node import PrivateNode
from services.broker.publisher import Outgoing, Publisher
from services.broker.queue_counts import Counts

__all__ = [
    "BrokerAddress",
    "Consumer",
    "Counts",
    "Declares",
    "Delivery",
    "Outgoing",
    "PrivateNode",
    "Publisher",
]
