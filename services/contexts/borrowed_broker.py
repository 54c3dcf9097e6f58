"""The broker that this node's keeper keeps warm, for the time of a run."""

import contextlib
from collections.abc import Callable

import structlog

from services.contexts.protocol import Borrow, GiveBack, KeeperChannel, KeptBroker
from services.contexts.start_keeper import connected, open_keeper
from services.contracts import Settings
from services.contracts.errors import KeeperError
from services.node.runtime_dir import open_runtime_dir

# To start a node takes seconds, on a slow machine a minute.
_START_SECONDS = 150.0

log = structlog.get_logger(__name__)


class BorrowedBroker:
    """Ours for as long as the connection to the keeper is open."""

    def __init__(self, channel: KeeperChannel, broker: KeptBroker) -> None:
        self._channel = channel
        self.url = broker.url
        self.password = broker.password.get_secret_value()

    @property
    def ended(self) -> bool:
        """Whether the keeper has ended, and the broker with it."""
        return self._channel.is_closed

    def give_back(self, claims_queue: str | None) -> None:
        """The run is over, and nothing of it is left in its queues; None where it was not used."""
        with contextlib.suppress(KeeperError):  # it may be gone
            self._channel.send(GiveBack(claims_queue=claims_queue))

    def close(self) -> None:
        """Without `give_back` before it, the keeper throws the broker away."""
        self._channel.close()


def warm_broker(settings: Settings, stopped: Callable[[], bool]) -> None:
    """Let this node's keeper, which is started if there is none, have a broker ready for the next
    run; where it cannot, that run starts its own.
    """
    channel = open_keeper(settings, stopped)
    borrowed = None if channel is None else _borrowed(channel, stopped)
    if borrowed is not None:
        borrowed.give_back(None)
        borrowed.close()


def borrow_broker(
    settings: Settings, stopped: Callable[[], bool] = lambda: False
) -> BorrowedBroker | None:
    """The broker of this node's keeper; None where there is no keeper, or it has none for us, or
    when `stopped` says so while it starts one.
    """
    channel = connected(open_runtime_dir(settings.runtime_dir))
    return None if channel is None else _borrowed(channel, stopped)


def _borrowed(channel: KeeperChannel, stopped: Callable[[], bool]) -> BorrowedBroker | None:
    try:
        reply = channel.ask(Borrow(), _START_SECONDS, stopped)
    except KeeperError as error:
        log.warning("broker.not_borrowed", reason=str(error))
        reply = None
    if reply is None or reply.broker is None:
        # A keeper of an older version hangs up.
        log.info("broker.not_borrowed", reason=reply and reply.ended_because)
        channel.close()
        return None
    return BorrowedBroker(channel, reply.broker)
