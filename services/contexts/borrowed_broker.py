"""The use of the broker that this node's keeper keeps warm, for the duration of a run."""

import contextlib
from collections.abc import Callable

import structlog

from services.contexts.keeper_client import connect, open_keeper
from services.contexts.protocol import Borrow, GiveBack, KeeperChannel, KeptBroker
from services.contracts import Settings
from services.contracts.errors import KeeperError
from services.node.runtime_dir import open_runtime_dir

# Starting a RabbitMQ node takes seconds, on a slow machine a minute.
_START_SECONDS = 150.0

log = structlog.get_logger(__name__)


class BorrowedBroker:
    """The keeper's broker, lent while the connection to the keeper is open."""

    def __init__(self, channel: KeeperChannel, broker: KeptBroker) -> None:
        self._channel = channel
        self.url = broker.url
        self.password = broker.password.get_secret_value()

    @property
    def ended(self) -> bool:
        """Whether the keeper has ended, and the broker with it."""
        return self._channel.is_closed

    def give_back(self, claims_queue: str | None) -> None:
        """Give it back with nothing of the run left in its queues; None if it was not used."""
        with contextlib.suppress(KeeperError):  # the keeper may have ended
            self._channel.send(GiveBack(claims_queue=claims_queue))

    def close(self) -> None:
        """End the loan. Without `give_back` before it, the keeper discards the broker."""
        self._channel.close()


def warm_broker(settings: Settings, stopped: Callable[[], bool]) -> None:
    """Have this node's keeper, started if need be, prepare a broker for the next run. If it cannot,
    that run starts its own broker.
    """
    channel = open_keeper(settings, stopped)
    borrowed = None if channel is None else _borrowed(channel, stopped)
    if borrowed is not None:
        borrowed.give_back(None)
        borrowed.close()


def borrow_broker(
    settings: Settings, stopped: Callable[[], bool] = lambda: False
) -> BorrowedBroker | None:
    """The broker of this node's keeper; None if there is no keeper, if it lends none, or if
    `stopped` becomes true while it starts one.
    """
    channel = connect(open_runtime_dir(settings.runtime_dir))
    return None if channel is None else _borrowed(channel, stopped)


def _borrowed(channel: KeeperChannel, stopped: Callable[[], bool]) -> BorrowedBroker | None:
    try:
        reply = channel.ask(Borrow(), _START_SECONDS, stopped)
    except KeeperError as error:
        log.warning("broker.not_borrowed", reason=str(error))
        reply = None
    if reply is None or reply.broker is None:
        # A keeper of an older version closes the connection.
        log.info("broker.not_borrowed", reason=reply and reply.error)
        channel.close()
        return None
    return BorrowedBroker(channel, reply.broker)
