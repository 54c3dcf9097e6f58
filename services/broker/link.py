"""A connection to the broker, owned by one thread, which reopens it when it is lost."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import pika
import structlog
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import (
    AMQPConnectionWorkflowAborted,
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
from services.broker.declarations import Declares, declare, queue_made_before_4
from services.broker.metrics import BLOCKED, CONNECTED, RECONNECTS
from services.broker.queue_counts import Counts, count_queues
from services.broker.tls import tls_fault
from services.contracts.backoff import backoff_seconds
from services.contracts.clock import awake_seconds
from services.contracts.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnreachable,
    BrokerUntrusted,
    TopologyMismatch,
)

_FIRST_DELAY_SECONDS = 0.25
# A broker that starts again is out for 5 to 10 s. With a longer wait than this the links would be
# idle for as long again; a refused attempt costs next to nothing.
_LONGEST_DELAY_SECONDS = 5.0
_OPEN_POLL_SECONDS = 0.2
# A broker that is starting refuses logins until it has loaded its users.
_REFUSED_SECONDS = 60.0
_ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED, _NOT_ALLOWED = 403, 404, 406, 530

log = structlog.get_logger(__name__)

# The links of this process that wait before their next attempt.
_waiting: set["Link"] = set()


class Link:
    """What `Publisher` and `Consumer` share: a connection, its channel, and their one thread.

    Only the owning thread touches pika; other threads reach it through `_call_soon`. A lost
    connection or channel is reopened with exponential backoff, without a limit, once the first one
    was opened. When one link of a process reaches the broker, the others wait no longer. A broker
    that refuses us for a minute (for example because the password was changed) ends the link. The
    `_on_…` hooks run on the owning thread.
    """

    def __init__(self, address: BrokerAddress, name: str, declares: Declares) -> None:
        self._address = address
        self._name = name
        self._declares = declares
        self._core_is_missing = False
        self.made_before_4: set[str] = set()
        """Queues, of those declared here, that were made before RabbitMQ 4: their messages can be
        returned 20 times, unless a policy lifts that limit."""
        self._loop = IOLoop()
        self._connection: pika.SelectConnection | None = None
        self._channel: Channel | None = None
        self._failures = 0
        self._retry: Any = None  # the loop's timer for the next attempt
        self._lost_because = ""
        self._routinely = False
        self._was_open = self._was_in_service = False
        self._closing = False
        self._refused_since: float | None = None
        self._given_up = False
        self._counting = False
        self.blocked_by: str | None = None
        """The broker's alarm (memory, disk) that blocks publishing on this link; None if there is
        none.
        """
        self._connected_metric = CONNECTED.labels(name)
        self._blocked_metric = BLOCKED.labels(name)
        self._reconnects_metric = RECONNECTS.labels(name)
        self._error: BrokerError | None = None
        self._opened_or_failed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"link-{name}", daemon=True)

    def open(self, timeout_seconds: float, stopped: Callable[[], bool] = lambda: False) -> Self:
        """Connect, and declare exchanges and queues according to `declares`.

        Raises BrokerRefused, BrokerUntrusted or TopologyMismatch at once, and BrokerUnreachable
        after the time-out or when `stopped` returns True.
        """
        self._thread.start()
        deadline = awake_seconds() + timeout_seconds
        while not self._opened_or_failed.wait(_OPEN_POLL_SECONDS):
            if awake_seconds() > deadline or stopped():
                break
        if not self._was_open:
            error = self._error or BrokerUnreachable(
                f"nothing answered at {self._address} for {timeout_seconds:g} s"
            )
            self.close()
            raise error
        return self

    def open_until_stopped(self, stop: threading.Event, on_wait: Callable[[], None]) -> bool:
        """Like `open` without a time-out, for a service that has used the broker before. False if
        `stop` was set first. `on_wait` is called several times a second.
        """
        self._thread.start()
        while not self._opened_or_failed.wait(_OPEN_POLL_SECONDS):
            if stop.is_set():
                return False
            on_wait()
        if not self._was_open:
            raise self._error or BrokerUnreachable(f"the link {self._name} is closed")
        return True

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Close the connection and end the thread. Unconfirmed messages may be lost."""
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
        """Why the link cannot be used now; None while it is open and no alarm blocks it."""
        if not self.connected:
            return f"no connection to the broker ({self._name})"
        blocked_by = self.blocked_by
        return None if blocked_by is None else f"the broker blocks publishing: {blocked_by}"

    def raise_if_dead(self) -> None:
        """Raises BrokerError once the link has ended. For threads that wait for it."""
        if not self._thread.is_alive():
            raise self._error or BrokerUnreachable(f"the link {self._name} is closed")

    def request_counts(self, queues: Sequence[str], on_counts: Callable[[Counts], None]) -> None:
        """Ask for the lengths of the queues; never waits. `on_counts` is called on the link's
        thread.

        The request is dropped without a connection, and while an earlier one is unanswered.
        """
        self._call_soon(lambda: self._request_counts(queues, on_counts))

    # Hooks for the two kinds of link.

    def _on_channel_ready(self, channel: Channel) -> None:
        """Called once all is declared on a new channel. Must call `_in_service` once ready."""
        raise NotImplementedError

    def _on_channel_lost(self) -> None:
        """Called when the channel is lost. Must discard the state of that channel."""
        raise NotImplementedError

    # The owning thread.

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self._loop.add_callback_threadsafe(callback)

    def _run(self) -> None:
        self._call_soon(self._connect)
        try:
            while not self._run_loop():
                pass
        except Exception as error:
            log.exception("broker.link_died", link=self._name)
            self._error = BrokerError(f"the link {self._name} died: {error!r}; this is a bug")
            raise
        finally:
            self._channel = None
            self._connected_metric.set(0)
            self._blocked_metric.set(0)
            _waiting.discard(self)
            # Other threads may still call `_call_soon`; on a closed loop it does nothing.
            self._loop.close()
            self._opened_or_failed.set()

    def _run_loop(self) -> bool:
        """Run the loop until it stops. False to go on after an error of pika's: ValueError if the
        socket was reset between the handshake and its first use, AssertionError if a connection was
        closed during the handshake (pika 1.4 passes the class of its exception, not an instance).
        """
        try:
            self._loop.start()
        except AssertionError as error:
            if AMQPConnectionWorkflowAborted.__name__ not in str(error):
                raise
            return self._closing
        except ValueError as error:
            if "getpeername() failed" not in str(error):
                raise
            connection = self._connection
            self._on_connection_lost(connection, "reset right after it was opened")
            if connection is not None:
                connection.close()  # otherwise pika would continue to set it up
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
        abandoned = connection is not self._connection
        if abandoned:
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
            core_is_missing=self._core_is_missing,
            made_before_4=self.made_before_4,
        )

    def _on_declared(self, channel: Channel) -> None:
        self._channel = channel
        self._core_is_missing = False
        self._on_channel_ready(channel)

    def _in_service(self) -> None:
        if self._failures:
            for link in tuple(_waiting):
                if link._address == self._address:
                    link._call_soon(link._retry_now)
        self._failures, self._refused_since = 0, None
        self._connected_metric.set(1)
        if self._was_in_service:
            self._reconnects_metric.inc()
        self._was_in_service = True
        log_method = log.debug if self._routinely else log.info
        log_method("broker.connected", link=self._name, broker=str(self._address))
        self._routinely = False
        self._set_opened()

    def _set_opened(self) -> None:
        self._was_open = True
        self._opened_or_failed.set()

    def _request_counts(self, queues: Sequence[str], on_counts: Callable[[Counts], None]) -> None:
        def done(counts: Counts) -> None:
            self._counting = False
            on_counts(counts)

        if self._channel is not None and self._connection is not None and not self._counting:
            self._counting = True
            count_queues(self._connection, queues, done)

    def _on_channel_closed(self, _: Channel, reason: BaseException) -> None:
        self._forget_channel()
        if isinstance(reason, ChannelClosedByBroker):
            if self._accept_existing_queue(queue_made_before_4(reason.reply_text)):
                return
            self._lost_because = f"{reason.reply_text} ({reason.reply_code})"
            if (
                reason.reply_code == _PRECONDITION_FAILED
                and "inequivalent arg" in reason.reply_text
            ):
                self._note_refusal(
                    TopologyMismatch(
                        f"{self._address} has a queue with other arguments than Keepwarm's: "
                        f"{reason.reply_text}. Drain and delete that queue, or use a virtual host "
                        "of Keepwarm's own"
                    )
                )
            elif (
                reason.reply_code == _PRECONDITION_FAILED and "is larger than" in reason.reply_text
            ):
                self._give_up(
                    BrokerError(
                        f"the broker at {self._address} refuses a message because of its size: "
                        f"{reason.reply_text}. Set max_message_size = 16777216 in its "
                        "rabbitmq.conf and restart it, or submit the file with a smaller "
                        "--batch-size"
                    )
                )
            elif reason.reply_code == _ACCESS_REFUSED or _is_a_limit(reason.reply_text):
                self._note_refusal(self._refusal_error(reason.reply_text))
            elif reason.reply_code == _NOT_FOUND:
                self._on_not_found(reason.reply_text)
        # A link that may declare what is missing does so on the next connection.
        declares = self._core_is_missing and self._declares.core != "never"
        self._restart_connection(routinely=declares)

    def _accept_existing_queue(self, queue: str | None) -> bool:
        """Declare everything again on a new channel, this queue without a delivery limit. False if
        that is impossible or was tried already.
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
            hint="the queue is older than RabbitMQ 4, which removes a message that was returned 20 "
            "times; a policy lifts this limit, see docs/broker.md",
        )
        connection.channel(on_open_callback=self._on_channel_open)
        return True

    def _on_not_found(self, reply_text: str) -> None:
        """An exchange or a queue is missing. A link that may declare it does so next time."""
        self._core_is_missing = True
        if self._declares.core == "never":
            self._lost_because = f"{reply_text}; waiting for a producer and a collector to make it"
            self._set_opened()  # the broker accepts us: only waiting is left

    def _restart_connection(self, *, routinely: bool = False) -> None:
        self._routinely = routinely
        # Every fault is handled in the same way: a new connection with a new channel. The old
        # channel must not be used again, even before the broker has closed it: pika would raise.
        self._forget_channel()
        if self._connection is not None and self._connection.is_open:
            self._connection.close(reply_text="channel lost")

    def _on_connection_lost(self, connection: Any, reason: BaseException | str) -> None:
        if connection is not self._connection:
            return  # abandoned before
        self._forget_channel()
        self._connection, self.blocked_by, self._counting = None, None, False
        self._blocked_metric.set(0)
        if self._closing:
            self._loop.stop()
            return
        error = self._explain(reason)
        if isinstance(error, BrokerRefused | BrokerUntrusted):
            self._note_refusal(error)
        elif not self._lost_because:  # otherwise we closed it ourselves, after a refusal
            self._refused_since = None
        if self._given_up:
            self._loop.stop()
            return
        if not self._was_open:
            self._error = self._error or error
            if isinstance(self._error, BrokerUnreachable):
                self._error = error
        self._failures += 1
        delay = backoff_seconds(
            self._failures,
            first_seconds=_FIRST_DELAY_SECONDS,
            longest_seconds=_LONGEST_DELAY_SECONDS,
        )
        self._loss_log_method()(
            "broker.waiting",
            link=self._name,
            reason=self._lost_because or str(error),
            again_in_seconds=round(delay, 2),
        )
        self._lost_because = ""
        self._retry = self._loop.call_later(delay, self._reconnect)
        _waiting.add(self)

    def _loss_log_method(self) -> Callable[..., None]:
        """Connections are lost now and then, and queues may be declared after their consumers
        start: it is worth a warning only if the next attempt fails too.
        """
        first: Callable[..., None] = log.debug if self._routinely else log.info
        later: Callable[..., None] = log.info if self._core_is_missing else log.warning
        return first if self._failures == 1 else later

    def _retry_now(self) -> None:
        """Another link of this process has found the broker: do not wait any longer."""
        if self._retry is not None:
            self._loop.remove_timeout(self._retry)
            self._reconnect()

    def _reconnect(self) -> None:
        self._retry = None
        _waiting.discard(self)
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
        """A refusal, which waiting does not change, ends `open` at once. Later it ends the link if
        it lasts, because a process that waits may hold a GPU.
        """
        if not self._was_open:
            self._error = error
            self._opened_or_failed.set()
            return
        if _is_a_limit(str(error)):
            return  # lost connections count for a while, and other processes end
        now = awake_seconds()
        self._refused_since = now if self._refused_since is None else self._refused_since
        if now - self._refused_since >= _REFUSED_SECONDS:
            self._give_up(error)

    def _give_up(self, error: BrokerError) -> None:
        """End the link once its connection is closed."""
        log.error("broker.refused", link=self._name, reason=str(error))
        self._error, self._given_up = error, True

    def _refusal_error(self, why: str) -> BrokerRefused:
        if _is_a_limit(why):
            return BrokerRefused(
                f"the broker at {self._address} refused us: {why}. Close unused connections, or "
                "raise the limits with `keepwarm broker setup --workers N`"
            )
        return BrokerRefused(
            f"the broker at {self._address} refused us: {why}. Check the user, the password "
            "(KEEPWARM_BROKER_PASSWORD or …_PASSWORD_FILE), the virtual host and its permissions"
        )

    def _explain(self, reason: BaseException | str) -> BrokerError:
        cause = _root(reason)
        refused = (
            isinstance(cause, AuthenticationError)
            # Pika guesses these for any connection that ends early; RabbitMQ's own close confirms
            # it.
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
            return self._refusal_error(str(cause))
        fault = tls_fault(
            cause,
            self._address.host,
            plain="Use the port that does, 5671 by default; or write amqp:// if nobody in between "
            "can read passwords and claims",
            certificate=self._address.shows_certificate,
        )
        if fault is not None:
            return BrokerUntrusted(f"no TLS connection to the broker at {self._address}: {fault}")
        hint = "Check that it is running and that the address is right"
        if isinstance(cause, IncompatibleProtocolError) and self._address.tls is None:
            hint = (
                "If that port expects TLS, write amqps://; otherwise check what is listening there"
            )
        return BrokerUnreachable(f"no connection to the broker at {self._address}: {cause}. {hint}")


def _is_a_limit(why: str) -> bool:
    """Whether RabbitMQ reports too many connections, channels or queues of a user or virtual host:
    "connection limit (60) is reached", "has reached the maximum allowed user limit of (9)".
    """
    return "limit" in why and "reached" in why


def _root(reason: BaseException | str) -> BaseException | str:
    """The first cause of a failed connection, which pika wraps two or three times."""
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
