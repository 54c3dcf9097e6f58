"""A connection to the broker that one thread owns, opens, and opens again when it is lost."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import pika
import structlog
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import (
    AMQPConnectionWorkflowFailed,
    AMQPConnectorPhaseErrorBase,
)
from pika.channel import Channel
from pika.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    IncompatibleProtocolError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from services.broker.address import BrokerAddress
from services.broker.metrics import BLOCKED, CONNECTED, RECONNECTS
from services.broker.queue_counts import Counts, count_queues
from services.broker.tls import tls_fault
from services.broker.topology import Declares, declare, queue_made_before_4
from services.contracts.backoff import growing_pause
from services.contracts.clock import awake
from services.contracts.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnreachable,
    BrokerUntrusted,
    TopologyMismatch,
)

_FIRST_DELAY_SECONDS = 0.25
_LONGEST_DELAY_SECONDS = 15.0
_LOOK_SECONDS = 0.2
# A broker that starts refuses for a moment as well, until it has loaded its users.
_REFUSED_SECONDS = 60.0
_ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED, _NOT_ALLOWED = 403, 404, 406, 530

log = structlog.get_logger(__name__)


class Link:
    """What `Publisher` and `Consumer` share: a connection, its channel, and their one thread.

    Only the owning thread touches pika; other threads reach it through `_call_soon`. A lost
    connection or channel is opened again with exponential backoff and full jitter, once the first
    one was opened, for as long as nobody answers. A broker that answers and refuses us for a minute
    (the password was changed) ends the link. The `_on_…` hooks run on the owning thread.
    """

    def __init__(self, address: BrokerAddress, name: str, declares: Declares) -> None:
        self._address = address
        self._name = name
        self._declares = declares
        self._house_is_missing = False
        self.made_before_4: set[str] = set()
        """Queues that RabbitMQ 4 took over from an older version, as far as they were declared
        here: their messages may be returned 20 times, unless a policy lifts that."""
        self._loop = IOLoop()
        self._connection: pika.SelectConnection | None = None
        self._channel: Channel | None = None
        self._failures = 0
        self._lost_because = ""
        self._routinely = False
        self._was_open = self._was_in_service = False
        self._closing = False
        self._refused_since: float | None = None
        self._given_up = False
        self._counting = False
        self.blocked_by: str | None = None
        """The broker's alarm (memory, disk) that blocks publishing here, while it lasts."""
        self._connected_metric = CONNECTED.labels(name)
        self._blocked_metric = BLOCKED.labels(name)
        self._reconnects_metric = RECONNECTS.labels(name)
        self._error: BrokerError | None = None
        self._opened_or_failed = threading.Event()
        self._thread = threading.Thread(target=self._own, name=f"link-{name}", daemon=True)

    def open(self, timeout_seconds: float, stopped: Callable[[], bool] = lambda: False) -> Self:
        """Connect, and declare what is ours to declare.

        Raises BrokerRefused, BrokerUntrusted or TopologyMismatch at once, BrokerUnreachable after
        the time-out, or when `stopped` says so.
        """
        self._thread.start()
        deadline = awake() + timeout_seconds
        while not self._opened_or_failed.wait(_LOOK_SECONDS):
            if awake() > deadline or stopped():
                break
        if not self._was_open:
            error = self._error or BrokerUnreachable(
                f"nothing answered at {self._address} for {timeout_seconds:g} s"
            )
            self.close()
            raise error
        return self

    def open_in_time(self, stop: threading.Event, waiting: Callable[[], None]) -> bool:
        """As `open`, for as long as it takes: for a service that has used the broker before. False
        when `stop` was set first; `waiting` is called several times a second.
        """
        self._thread.start()
        while not self._opened_or_failed.wait(_LOOK_SECONDS):
            if stop.is_set():
                return False
            waiting()
        if not self._was_open:
            raise self._error or BrokerUnreachable(f"the link {self._name} is closed")
        return True

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Close the connection and end the thread. What is not confirmed by then may be lost."""
        if self._thread.is_alive():
            self._call_soon(self._begin_close)
            self._thread.join(timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        return self._channel is not None

    @property
    def readiness_error(self) -> str | None:
        """Why nothing can be done with it now; None while it is open, and no alarm blocks it."""
        if not self.connected:
            return f"no connection to the broker ({self._name})"
        blocked_by = self.blocked_by
        return None if blocked_by is None else f"the broker blocks publishing: {blocked_by}"

    def raise_if_dead(self) -> None:
        """For threads that wait for this link. Raises BrokerError once it has ended for good."""
        if not self._thread.is_alive():
            raise self._error or BrokerUnreachable(f"the link {self._name} is closed")

    def ask_counts(self, queues: Sequence[str], heard: Callable[[Counts], None]) -> None:
        """Ask how long the queues are; never waits. `heard` is called on the link's thread.

        No answer comes without a connection, or while an earlier question is not answered yet.
        """
        self._call_soon(lambda: self._ask_counts(queues, heard))

    # Hooks for the two kinds of link.

    def _on_channel_ready(self, channel: Channel) -> None:
        """All is declared on a new channel. Calls `_in_service` once it can do its work."""
        raise NotImplementedError

    def _on_channel_lost(self) -> None:
        """Nothing that belonged to the old channel counts any more."""
        raise NotImplementedError

    # The owning thread.

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self._loop.add_callback_threadsafe(callback)

    def _own(self) -> None:
        self._call_soon(self._connect)
        try:
            while not self._ran():
                pass
        except Exception as error:
            log.exception("broker.link_died", link=self._name)
            self._error = BrokerError(f"the link {self._name} died: {error!r}; this is a bug")
            raise
        finally:
            self._channel = None
            self._connected_metric.set(0)
            self._blocked_metric.set(0)
            # Other threads may still call `_call_soon`; on a closed loop it does nothing.
            self._loop.close()
            self._opened_or_failed.set()

    def _ran(self) -> bool:
        """The loop, to its end. False where pika takes a socket that was reset at once, between the
        handshake and its first use, for a mistake of ours.
        """
        try:
            self._loop.start()
        except ValueError as error:
            if "getpeername() failed" not in str(error):
                raise
            connection = self._connection
            self._on_connection_lost(connection, "reset as soon as it was there")
            if connection is not None:
                connection.close()  # or pika would go on with it by and by
            return False
        return True

    def _connect(self) -> None:
        self._connection = pika.SelectConnection(
            self._address.parameters(f"keepwarm {self._name}"),
            on_open_callback=self._on_connection_open,
            on_open_error_callback=self._on_connection_lost,
            on_close_callback=self._on_connection_lost,
            custom_ioloop=self._loop,
        )

    def _on_connection_open(self, connection: Any) -> None:
        given_up_on = connection is not self._connection
        if given_up_on:
            connection.close()
            return
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        connection.channel(on_open_callback=self._on_channel_open)

    def _on_blocked(self, _: Any, frame: Any) -> None:
        self.blocked_by = str(frame.method.reason)
        self._blocked_metric.set(1)
        log.warning("broker.blocked", link=self._name, reason=self.blocked_by)

    def _on_unblocked(self, *_: Any) -> None:
        self.blocked_by = None
        self._blocked_metric.set(0)
        log.info("broker.unblocked", link=self._name)

    def _on_channel_open(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        assert self._connection is not None and self._connection.server_properties is not None
        declare(
            channel,
            str(self._connection.server_properties["version"]),
            self._declares,
            lambda: self._on_declared(channel),
            house_is_missing=self._house_is_missing,
            made_before_4=self.made_before_4,
        )

    def _on_declared(self, channel: Channel) -> None:
        self._channel = channel
        self._house_is_missing = False
        self._on_channel_ready(channel)

    def _in_service(self) -> None:
        self._failures, self._refused_since = 0, None
        self._connected_metric.set(1)
        if self._was_in_service:
            self._reconnects_metric.inc()
        self._was_in_service = True
        say = log.debug if self._routinely else log.info
        say("broker.connected", link=self._name, broker=str(self._address))
        self._routinely = False
        self._reached()

    def _reached(self) -> None:
        self._was_open = True
        self._opened_or_failed.set()

    def _ask_counts(self, queues: Sequence[str], heard: Callable[[Counts], None]) -> None:
        def done(counts: Counts) -> None:
            self._counting = False
            heard(counts)

        if self._channel is not None and self._connection is not None and not self._counting:
            self._counting = True
            count_queues(self._connection, queues, done)

    def _on_channel_closed(self, _: Channel, reason: BaseException) -> None:
        self._forget_channel()
        if isinstance(reason, ChannelClosedByBroker):
            if self._take_as_it_is(queue_made_before_4(reason.reply_text)):
                return
            self._lost_because = f"{reason.reply_text} ({reason.reply_code})"
            if (
                reason.reply_code == _PRECONDITION_FAILED
                and "inequivalent arg" in reason.reply_text
            ):
                self._note_refusal(
                    TopologyMismatch(
                        f"{self._address} has a queue that Keepwarm would declare otherwise: "
                        f"{reason.reply_text}. Drain and delete that queue, or use a virtual host "
                        "of its own"
                    )
                )
            elif reason.reply_code == _ACCESS_REFUSED or _is_a_limit(reason.reply_text):
                self._note_refusal(self._refused(reason.reply_text))
            elif reason.reply_code == _NOT_FOUND:
                self._on_not_found(reason.reply_text)
        # Whoever may declare what is missing does so with the next connection.
        declares = self._house_is_missing and self._declares.core != "never"
        self._restart_connection(routinely=declares)

    def _take_as_it_is(self, queue: str | None) -> bool:
        """Declare it all once more, that queue with the arguments that it has. False where that
        cannot be done, or was done already.
        """
        connection = self._connection
        if queue is None or queue in self.made_before_4:
            return False
        if connection is None or not connection.is_open:
            return False
        self.made_before_4.add(queue)
        log.warning(
            "broker.delivery_limit",
            link=self._name,
            queue=queue,
            hint="made before RabbitMQ 4, which gives up a message that was returned 20 times; a "
            "policy lifts that, see docs/broker.md",
        )
        connection.channel(on_open_callback=self._on_channel_open)
        return True

    def _on_not_found(self, what: str) -> None:
        """An exchange or a queue is not there. Whoever may declare it does so next time."""
        self._house_is_missing = True
        if self._declares.core == "never":
            self._lost_because = f"{what}; waiting for a producer and a collector to make it"
            self._reached()  # the broker is there and takes us: waiting is all that is left to do

    def _restart_connection(self, *, routinely: bool = False) -> None:
        self._routinely = routinely
        # One way back from every fault: a new connection, with a new channel on it. The old one may
        # be asked nothing more, even before the broker knows: pika would raise.
        self._forget_channel()
        if self._connection is not None and self._connection.is_open:
            self._connection.close(reply_text="channel lost")

    def _on_connection_lost(self, connection: Any, reason: BaseException | str) -> None:
        if connection is not self._connection:
            return  # given up on before
        self._forget_channel()
        self._connection, self.blocked_by, self._counting = None, None, False
        self._blocked_metric.set(0)
        if self._closing:
            self._loop.stop()
            return
        error = self._explain(reason)
        if isinstance(error, BrokerRefused | BrokerUntrusted):
            self._note_refusal(error)
        elif not self._lost_because:  # or it is we who closed it, for a refusal
            self._refused_since = None
        if self._given_up:
            self._loop.stop()
            return
        if not self._was_open:
            self._error = self._error or error
            if isinstance(self._error, BrokerUnreachable):
                self._error = error
        self._failures += 1
        delay = growing_pause(
            self._failures,
            first_seconds=_FIRST_DELAY_SECONDS,
            longest_seconds=_LONGEST_DELAY_SECONDS,
        )
        self._level_of_loss()(
            "broker.waiting",
            link=self._name,
            reason=self._lost_because or str(error),
            again_in_seconds=round(delay, 2),
        )
        self._lost_because = ""
        self._loop.call_later(delay, self._reconnect)

    def _level_of_loss(self) -> Callable[..., None]:
        """Connections are lost now and then, and queues come later than their readers; it is worth
        a warning when the next attempt fails as well.
        """
        if self._failures == 1:
            quietly: Callable[..., None] = log.debug if self._routinely else log.info
            return quietly
        loud: Callable[..., None] = log.info if self._house_is_missing else log.warning
        return loud

    def _reconnect(self) -> None:
        if self._closing:
            self._loop.stop()
        else:
            self._connect()

    def _forget_channel(self) -> None:
        self._connected_metric.set(0)
        if self._channel is not None:
            self._channel = None
            self._on_channel_lost()

    def _begin_close(self) -> None:
        self._closing = True
        self._forget_channel()
        if self._connection is None:
            self._loop.stop()
            return
        with contextlib.suppress(pika.exceptions.ConnectionWrongStateError):
            self._connection.close()

    def _note_refusal(self, error: BrokerError) -> None:
        """What no waiting will change ends `open` at once, and later the link, when it lasts:
        whoever waits for it may hold a GPU.
        """
        if not self._was_open:
            self._error = error
            self._opened_or_failed.set()
            return
        if _is_a_limit(str(error)):
            return  # connections that are lost are counted for a while, and others end
        now = awake()
        self._refused_since = now if self._refused_since is None else self._refused_since
        if now - self._refused_since >= _REFUSED_SECONDS:
            log.error("broker.refused", link=self._name, reason=str(error))
            self._error, self._given_up = error, True

    def _refused(self, why: str) -> BrokerRefused:
        if _is_a_limit(why):
            return BrokerRefused(
                f"the broker at {self._address} refused us: {why}. Close what is connected for "
                "nothing; `keepwarm broker setup --workers N` raises the limits"
            )
        return BrokerRefused(
            f"the broker at {self._address} refused us: {why}. Check the user, the password "
            "(KEEPWARM_BROKER_PASSWORD or …_PASSWORD_FILE), the virtual host and its permissions"
        )

    def _explain(self, reason: BaseException | str) -> BrokerError:
        cause = _root(reason)
        refused = (
            isinstance(cause, AuthenticationError)
            # Pika guesses so of any connection that ends early; RabbitMQ says so where it is so.
            or (
                isinstance(cause, ProbableAuthenticationError | ProbableAccessDeniedError)
                and ConnectionClosedByBroker.__name__ in str(cause)
            )
            or (
                isinstance(cause, ConnectionClosedByBroker)
                and cause.reply_code in (_ACCESS_REFUSED, _NOT_ALLOWED)
            )
        )
        if refused:
            return self._refused(str(cause))
        fault = tls_fault(
            cause,
            self._address.host,
            plain="Name the port that does, 5671 by default; or write amqp://, where nobody on the "
            "way can read passwords and claims",
            certificate=self._address.shows_certificate,
        )
        if fault is not None:
            return BrokerUntrusted(f"no TLS connection to the broker at {self._address}: {fault}")
        hint = "Is it running, and is the address right?"
        if isinstance(cause, IncompatibleProtocolError) and self._address.tls is None:
            hint = (
                "Is that a port for TLS? Then write amqps://; or is something else running there?"
            )
        return BrokerUnreachable(f"no connection to the broker at {self._address}: {cause}. {hint}")


def _is_a_limit(why: str) -> bool:
    """Whether RabbitMQ says that a user or virtual host has too many connections, channels or
    queues: "connection limit (60) is reached", "has reached the maximum allowed user limit of (9)".
    """
    return "limit" in why and "reached" in why


def _root(reason: BaseException | str) -> BaseException | str:
    """Pika wraps the first cause of a failed connection two or three times."""
    inner: Any = reason
    while True:
        if isinstance(inner, AMQPConnectionWorkflowFailed):
            inner = inner.exceptions[-1]
        elif isinstance(inner, AMQPConnectorPhaseErrorBase):
            inner = inner.exception
        elif isinstance(inner, AMQPConnectionError) and isinstance(
            next(iter(inner.args), None), BaseException
        ):
            inner = inner.args[0]
        else:
            return inner  # type: ignore[no-any-return]
