"""The keeper's protocol: requests and replies as lines of JSON over a unix socket.

A connection that sends `Attach` is a lease: the engine is in use while the connection is open, so
the lease ends when its worker dies. Names in JSON stay as they are: workers and keepers of two
successive versions talk to each other.
"""

import os
import socket
import struct
import time
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
from services.contracts import ContextSpec
from services.contracts.bounds import Identity, Name
from services.contracts.clock import awake_seconds
from services.contracts.errors import KeeperError
from services.contracts.startup import StartupPhases
from services.contracts.values import Value
from services.node.device import Device
from services.node.line_reader import LineReader, LineTooLong

_SEND_SECONDS = 5.0
_ANSWER_POLL_SECONDS = 0.2

OTHER_VERSION = (
    "this node's keeper is of another version of Keepwarm; end it with `keepwarm contexts evict "
    "--all`, or with SIGTERM"
)

State = Literal["waiting", "starting", "warm", "asleep", "stopping"]


class ContextRecord(Value):
    """The public state of an engine. Times are those of the kernel's monotonic clock, which never
    jumps and is the same for all processes of a node. Unknown fields are ignored: a newer keeper
    may send more of them.
    """

    model_config = ConfigDict(extra="ignore", validate_by_name=True, serialize_by_alias=True)

    name: str
    context: ContextSpec
    device: str
    state: State
    progress: str = Field(default="", alias="says")
    """While it starts: the last line of its log, or what it waits for."""
    pid: int | None = None
    pid_started: float | None = None
    """When the process started, since a pid alone may be used again."""
    socket: str
    log: str
    since: float
    """When a worker first asked for it."""
    last_used: float
    """When a worker last attached or detached."""
    attached: int = 0
    """How many workers hold a lease now."""
    used: int = 0
    """How many leases there were in all."""
    memory_bytes: int | None = None
    demand: int = 0
    """How many claims wait for it, as far as this node's workers know."""
    phases: StartupPhases | None = None
    adapters: tuple[str, ...] = ()
    """The adapters that it has loaded."""

    @property
    def seconds(self) -> float:
        """The time since a worker first asked for it."""
        return max(0.0, time.monotonic() - self.since)


class Attach(Value):
    """Start this engine if need be, and keep it while the connection is open."""

    verb: Literal["attach"] = "attach"
    plan: EnginePlan


class Demand(Value):
    """How many claims wait for each context, as far as the worker knows. Has no reply."""

    verb: Literal["demand"] = "demand"
    claims: Annotated[dict[Identity, Annotated[int, Field(ge=0)]], Field(max_length=10_000)]


class DescribeDevice(Value):
    """Ask which device the keeper's engines use, for workers that do not see it themselves."""

    verb: Literal["look"] = "look"


class Status(Value):
    """Ask for the records of all engines that have not ended."""

    verb: Literal["status"] = "status"


class Evict(Value):
    """Stop these engines, given by name or context id, in use or not. The reply names those that
    ended. It comes when all of them have, or when the grace period is over.
    """

    verb: Literal["evict"] = "evict"
    wanted: tuple[Identity, ...]


class Drain(Value):
    """Stop all engines, start no more, and end. The reply names the engines that ended."""

    verb: Literal["drain"] = "drain"


class Borrow(Value):
    """Ask for the use of the keeper's broker while the connection is open."""

    verb: Literal["borrow"] = "borrow"


class GiveBack(Value):
    """End the use of the broker. The borrower has left nothing in the queues that every run has,
    nor in `claims_queue`; None if it did not use the broker. Has no reply.
    """

    verb: Literal["give-back"] = "give-back"
    claims_queue: Name | None


class KeptBroker(Value):
    """The keeper's broker. Only processes of the same user can ask for it."""

    url: str
    password: SecretStr

    @field_serializer("password")
    def _revealed(self, password: SecretStr) -> str:
        return password.get_secret_value()


Request = Attach | Demand | DescribeDevice | Status | Evict | Drain | Borrow | GiveBack
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="verb")])


class KeeperReply(Value):
    """A reply: the engine's record, or the result of a request. Unknown fields are ignored, because
    a newer keeper serves workers of the version before.
    """

    model_config = ConfigDict(extra="ignore", validate_by_name=True, serialize_by_alias=True)

    record: ContextRecord | None = None
    error: str | None = Field(default=None, alias="gone")
    """Why there is no engine any more, no device, or no broker."""
    out_of_memory: bool = False
    """Whether the engine ended because memory ran out."""
    warm: bool = False
    """Whether the engine was warm when the worker attached."""
    done: tuple[str, ...] = ()
    """The names of the engines that ended, in reply to `Evict` and `Drain`."""
    device: Device | None = None
    """What the engines compute on, in reply to `DescribeDevice`."""
    engines: tuple[ContextRecord, ...] = ()
    """The engines that have not ended, the oldest first, in reply to `Status`."""
    broker: KeptBroker | None = None
    """The broker, in reply to `Borrow`."""


class KeeperChannel:
    """One end of a connection between a keeper and another process of the same user."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises KeeperError when the other end belongs to another user."""
        self._connection = connection
        self._lines = LineReader(connection, awake_seconds)
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
        """Whether the other side closed the connection and all it sent was read. Never waits."""
        try:
            self._connection.settimeout(0)
            return self._connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def send(self, value: Value) -> None:
        """Raises KeeperError when the other side is gone, or does not read."""
        try:
            self._connection.settimeout(_SEND_SECONDS)
            self._connection.sendall(value.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise KeeperError(f"the other end of the keeper's socket is gone: {error}") from error

    def request(self, timeout_seconds: float) -> Request | None:
        """The next request; None when the other side is gone. Raises TimeoutError, KeeperError."""
        line = self._next_line(timeout_seconds)
        try:
            return None if line is None else _REQUEST.validate_json(line)
        except ValidationError as error:
            raise KeeperError(
                f"not a request of this version of Keepwarm: {error.error_count()} errors"
            ) from error

    def reply(self, timeout_seconds: float) -> KeeperReply | None:
        """The next reply; None when the keeper is gone. Raises TimeoutError, KeeperError."""
        line = self._next_line(timeout_seconds)
        try:
            return None if line is None else KeeperReply.model_validate_json(line)
        except ValidationError as error:
            raise KeeperError(OTHER_VERSION) from error

    def _next_line(self, timeout_seconds: float) -> bytes | None:
        try:
            return self._lines.next(timeout_seconds)
        except LineTooLong as error:
            raise KeeperError(f"the other end of the keeper's socket sent {error}") from error

    def ask(
        self,
        request: DescribeDevice | Status | Evict | Drain | Borrow,
        timeout_seconds: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> KeeperReply | None:
        """The reply to a request; None when the keeper ended first, or when `stopped` became true.

        Raises KeeperError when there is no reply in time.
        """
        try:
            self.send(request)
        except KeeperError:
            if self.is_closed:
                return None
            raise
        deadline = awake_seconds() + timeout_seconds
        while not stopped():
            left = max(0.0, deadline - awake_seconds())
            try:
                return self.reply(min(left, _ANSWER_POLL_SECONDS))
            except TimeoutError as error:
                if left > _ANSWER_POLL_SECONDS:
                    continue
                raise KeeperError(
                    f"this node's keeper did not answer within {timeout_seconds:g} s; see "
                    "keeper.log in KEEPWARM_RUNTIME_DIR"
                ) from error
        return None
