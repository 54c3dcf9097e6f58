"""What workers and people say to the keeper of their node: a line of JSON each way at a time.

A connection that attaches is a lease: the engine is in use for as long as it is open, and a worker
that dies lets go by dying.
"""

import os
import socket
import struct
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_serializer,
)

from services.contexts.plan import EnginePlan
from services.contexts.records import ContextRecord
from services.contracts.bounds import Identity, Name
from services.contracts.clock import awake
from services.contracts.errors import KeeperError
from services.contracts.values import Value
from services.node.device import Device

_MAX_LINE_BYTES = 1024 * 1024
_SEND_SECONDS = 5.0
_ANSWER_POLL_SECONDS = 0.2


class LineReader:
    """The lines that come on a connection. What has come of one that is late is kept."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""

    def next(self, timeout_seconds: float) -> bytes | None:
        """The next one, without its end; None when the other side is gone.

        Raises TimeoutError, and KeeperError for a line that is too long.
        """
        deadline = awake() + timeout_seconds
        while b"\n" not in self._unread:
            self._connection.settimeout(max(0.0, deadline - awake()))
            try:
                piece = self._connection.recv(65536)
            except (BlockingIOError, TimeoutError) as error:
                if awake() < deadline:  # we were stopped meanwhile, and so was the other side
                    continue
                raise TimeoutError from error
            except ConnectionError:
                return None
            if not piece:
                return None
            self._unread += piece
            if len(self._unread) > _MAX_LINE_BYTES:
                raise KeeperError(f"a line of more than {_MAX_LINE_BYTES:,} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        return line


class Attach(Value):
    """Have this engine ready, and keep it while we are connected."""

    verb: Literal["attach"] = "attach"
    plan: EnginePlan


class Demand(Value):
    """How many claims wait for contexts, as far as we have heard. Has no answer."""

    verb: Literal["demand"] = "demand"
    claims: Annotated[dict[Identity, Annotated[int, Field(ge=0)]], Field(max_length=10_000)]


class DescribeDevice(Value):
    """What do engines here compute on? For workers that do not see it themselves."""

    verb: Literal["look"] = "look"


class Evict(Value):
    """Stop these engines, named by themselves or by their contexts, in use or not. The answer names
    those that are gone, and comes when all are, or the grace period is over.
    """

    verb: Literal["evict"] = "evict"
    wanted: tuple[Identity, ...]


class Drain(Value):
    """Stop all engines, take no more, and end."""

    verb: Literal["drain"] = "drain"


class Borrow(Value):
    """Lend us the broker that you keep, for as long as we are connected."""

    verb: Literal["borrow"] = "borrow"


class GiveBack(Value):
    """We are done with the broker, and have left nothing in our queues: those that every run has,
    and this one. None: we did not use it. Has no answer.
    """

    verb: Literal["give-back"] = "give-back"
    claims_queue: Name | None


class KeptBroker(Value):
    """A broker on this node. Only processes of the same user can ask for it."""

    url: str
    password: SecretStr

    @field_serializer("password")
    def _revealed(self, password: SecretStr) -> str:
        return password.get_secret_value()


Request = Attach | Demand | DescribeDevice | Evict | Drain | Borrow | GiveBack
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="verb")])


class KeeperReply(Value):
    """An answer: how the engine is now, or what was done. What a newer keeper says besides is not
    heard: its engines serve workers of the version before.
    """

    model_config = ConfigDict(extra="ignore", validate_by_name=True, serialize_by_alias=True)

    record: ContextRecord | None = None
    ended_because: str | None = Field(default=None, alias="gone")
    """Why the engine is no more, or never was; or why there is no device."""
    warm: bool = False
    """Whether it was warm when we came."""
    done: tuple[str, ...] = ()
    device: Device | None = None
    """What engines here compute on, for whoever looked."""
    broker: KeptBroker | None = None
    """The broker that is lent."""


class KeeperChannel:
    """One end of a connection between a keeper and someone of the same user."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises KeeperError when the other end belongs to another user."""
        self._connection = connection
        self._lines = LineReader(connection)
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.geteuid():
            connection.close()
            raise KeeperError("the other end of the keeper's socket belongs to another user")

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    @property
    def is_closed(self) -> bool:
        """Whether the other side has hung up, and all that it said was read. Never waits."""
        try:
            self._connection.settimeout(0)
            return self._connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def send(self, value: Value) -> None:
        """Raises KeeperError when the other side is gone, or does not listen."""
        try:
            self._connection.settimeout(_SEND_SECONDS)
            self._connection.sendall(value.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise KeeperError(f"the other end of the keeper's socket is gone: {error}") from error

    def request(self, timeout_seconds: float) -> Request | None:
        """The next request; None when the other side is gone. Raises TimeoutError, KeeperError."""
        line = self._lines.next(timeout_seconds)
        try:
            return None if line is None else _REQUEST.validate_json(line)
        except ValidationError as error:
            raise KeeperError(f"not a request: {error.error_count()} faults") from error

    def reply(self, timeout_seconds: float) -> KeeperReply | None:
        """The next answer; None when the keeper is gone. Raises TimeoutError, KeeperError."""
        line = self._lines.next(timeout_seconds)
        try:
            return None if line is None else KeeperReply.model_validate_json(line)
        except ValidationError as error:
            raise KeeperError(
                "this node's keeper is of another version of Keepwarm; end it with "
                "`keepwarm contexts evict --all`, or with SIGTERM"
            ) from error

    def ask(
        self,
        request: DescribeDevice | Evict | Drain | Borrow,
        timeout_seconds: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> KeeperReply | None:
        """The answer to a request; None when the keeper ended first, or `stopped` said so
        meanwhile. Raises KeeperError.
        """
        self.send(request)
        deadline = awake() + timeout_seconds
        while not stopped():
            left = max(0.0, deadline - awake())
            try:
                return self.reply(min(left, _ANSWER_POLL_SECONDS))
            except TimeoutError as error:
                if left > _ANSWER_POLL_SECONDS:
                    continue
                raise KeeperError(
                    f"this node's keeper did not answer within {timeout_seconds:g} s; its log "
                    "says more"
                ) from error
        return None
