"""Serves the keeper's socket: leases, status, evictions, the broker, and the keeper's end."""

import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Literal, Protocol

import structlog
from pydantic import SecretStr

from services.contexts.keeper import Keeper
from services.contexts.managed_engine import ManagedEngine
from services.contexts.protocol import (
    Attach,
    Borrow,
    ContextRecord,
    Demand,
    DescribeDevice,
    Drain,
    Evict,
    GiveBack,
    KeeperChannel,
    KeeperReply,
    KeptBroker,
    State,
    Status,
)
from services.contracts import ContextSpec
from services.contracts.errors import EngineStartError, KeeperError, KeepwarmError
from services.node.device import find_device
from services.node.runtime_dir import is_same_file, keeper_socket
from services.telemetry import Watchdog

_LEASE_POLL_SECONDS = 0.05
_BROKER_CHECK_SECONDS = 0.5
_STOPPING_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 10.0
# Clients of a keeper that hangs find it, and are told that it does not answer.
_MAX_WAITING = 1024
# A keeper without engines, connections and broker waits this long for the next worker.
_LINGER_SECONDS = 15.0

log = structlog.get_logger(__name__)


class LentNode(Protocol):
    """A broker in use by a run; `PrivateNode` is one."""

    @property
    def url(self) -> str: ...
    @property
    def password(self) -> str: ...


class Broker(Protocol):
    """A broker that outlives runs, as engines do; `KeptNode` is one."""

    @property
    def exists(self) -> bool: ...
    def acquire(self) -> LentNode | None: ...
    def restart_if_down(self) -> None: ...
    def release(self, claims_queue: str | None) -> None: ...
    def discard(self) -> None: ...
    def end_if_idle(self) -> None: ...
    def close(self) -> None: ...


class KeeperServer:
    """Serves the keeper's socket until it is stopped."""

    def __init__(self, keeper: Keeper, *, until_idle: bool, broker: Broker | None = None) -> None:
        """With `until_idle` it ends when it has had nothing to keep for 15 seconds. Without a
        `broker` it lends none.
        """
        self._keeper = keeper
        self._broker = broker
        self._until_idle = until_idle
        self._stop = threading.Event()
        self._watchdog = Watchdog()
        self._connections = 0
        self._counting = threading.Lock()

    @property
    def liveness_error(self) -> str | None:
        """See `metrics_server.Service`. A drain is not an error, however long it takes."""
        return None if self._stop.is_set() else self._watchdog.liveness_error

    @property
    def readiness_error(self) -> str | None:
        return "it is draining" if self._stop.is_set() else None

    def stop(self) -> None:
        """Begin to stop. Any thread may call it."""
        self._stop.set()

    def serve(self) -> None:
        """Accept connections until the end, then stop every engine. A runtime directory that is
        removed, as clean-ups of /tmp do, is made again.

        Raises UsageError or KeeperError if that is not possible.
        """
        try:
            while self._listen() == "removed":
                self._keeper.recreate_directory()
        finally:
            self._keeper.close()
            if self._broker is not None:
                self._broker.close()
            log.info("keeper.stopped")

    def _listen(self) -> Literal["removed", "ended"]:
        """Accept connections until the socket is removed, or the keeper is to end."""
        path = keeper_socket(self._keeper.directory)
        with socket.socket(socket.AF_UNIX) as listener:
            # It gets its name once it listens, so that every client that finds it can connect.
            new = path.with_suffix(".new")
            new.unlink(missing_ok=True)
            listener.bind(str(new))
            new.chmod(0o600)
            listener.listen(_MAX_WAITING)
            own = new.lstat()
            new.rename(path)
            log.info("keeper.ready", directory=str(self._keeper.directory), pid=os.getpid())
            try:
                self._accept(listener, path, own)
            finally:
                removed = not is_same_file(own, path)
                if not removed:
                    path.unlink()
            return "removed" if removed else "ended"

    def _accept(self, listener: socket.socket, path: Path, own: os.stat_result) -> None:
        needed = time.monotonic()
        while not self._stop.is_set() and is_same_file(own, path):
            self._watchdog.beat()
            self._keeper.limit_logs()
            if self._broker is not None:
                self._broker.end_if_idle()
            kept = not self._keeper.empty or (self._broker is not None and self._broker.exists)
            if self._connections or kept or not self._until_idle:
                needed = time.monotonic()
            elif time.monotonic() - needed > _LINGER_SECONDS:
                return
            if not select.select([listener], [], [], 0.2)[0]:
                continue
            connection, _ = listener.accept()
            with self._counting:
                self._connections += 1
            threading.Thread(target=self._serve_connection, args=(connection,), daemon=True).start()

    def _serve_connection(self, connection: socket.socket) -> None:
        try:
            with contextlib.closing(KeeperChannel(connection)) as channel:
                self._handle_request(channel)
        except (OSError, KeepwarmError) as error:
            log.warning("keeper.connection_failed", reason=str(error))
        finally:
            with self._counting:
                self._connections -= 1

    def _handle_request(self, channel: KeeperChannel) -> None:
        request = channel.request(_REQUEST_SECONDS)
        if isinstance(request, Attach):
            served = False
            while not served:
                try:
                    engine, found = self._keeper.attach(request.plan, lambda: channel.is_closed)
                except KeepwarmError as error:
                    channel.send(KeeperReply(error=str(error)))
                    return
                try:
                    served = self._serve_lease(channel, engine, found, request.plan.spec)
                finally:
                    engine.detach()
        elif isinstance(request, Demand):
            self._keeper.update_demand(request.claims)
        elif isinstance(request, DescribeDevice):
            try:
                channel.send(KeeperReply(device=find_device()))
            except KeepwarmError as error:
                channel.send(KeeperReply(error=str(error)))
        elif isinstance(request, Status):
            channel.send(KeeperReply(engines=self._keeper.records()))
        elif isinstance(request, Borrow):
            self._lend(channel)
        elif isinstance(request, Evict):
            channel.send(KeeperReply(done=self._keeper.evict(request.wanted)))
        elif isinstance(request, Drain):
            try:
                ended = self._keeper.drain()
            finally:
                self.stop()  # even if the client is gone: a drained keeper is of no use
            channel.send(KeeperReply(done=ended))

    def _lend(self, channel: KeeperChannel) -> None:
        """Lend the broker until it is given back, or until the borrower is gone."""
        if self._broker is None:
            channel.send(KeeperReply(error="this keeper keeps no broker"))
            return
        try:
            node = self._broker.acquire()
        except KeepwarmError as error:
            channel.send(KeeperReply(error=str(error)))
            return
        if node is None:
            channel.send(KeeperReply(error="another run has the broker"))
            return
        give_back: GiveBack | None = None
        try:
            lent = KeptBroker(url=node.url, password=SecretStr(node.password))
            channel.send(KeeperReply(broker=lent))
            give_back = self._wait_for_give_back(channel, self._broker)
        finally:
            if give_back is None:
                self._broker.discard()
            else:
                self._broker.release(give_back.claims_queue)

    def _wait_for_give_back(self, channel: KeeperChannel, broker: Broker) -> GiveBack | None:
        """None when the borrower closed the connection without giving the broker back."""
        while True:
            try:
                request = channel.request(_BROKER_CHECK_SECONDS)
            except TimeoutError:
                broker.restart_if_down()
                continue
            return request if isinstance(request, GiveBack) else None

    def _serve_lease(
        self, channel: KeeperChannel, engine: ManagedEngine, found: State | None, spec: ContextSpec
    ) -> bool:
        """Report the engine's state to its worker until one of the two is gone.

        Only the worker for which the engine was started gets the start's phases: others would
        report the same start again. The engine is reported warm once it has answered as it did at
        its start, and has the worker's adapter. False when its answers have changed: then the
        worker needs another engine.
        """
        sent: ContextRecord | None = None
        checked = found != "warm"
        loaded = spec.adapter is None
        while True:
            record = engine.record
            if engine.ended_because is not None:
                if engine.answers_changed and (sent is None or sent.state != "warm"):
                    return False
                memory = engine.ran_out_of_memory
                channel.send(KeeperReply(error=engine.ended_because, out_of_memory=memory))
                return True
            if not checked and record.state == "warm":
                checked = engine.check()
                if not checked:
                    engine.join(_STOPPING_POLL_SECONDS)
                    continue
            if not loaded and record.state == "warm":
                try:
                    engine.load_adapter(spec, lambda: channel.is_closed)
                except EngineStartError as error:
                    channel.send(KeeperReply(error=str(error)))
                    return True
                loaded = True
            if sent is None or (record.state, record.progress) != (sent.state, sent.progress):
                sent = record
                if found is not None:
                    record = record.model_copy(update={"phases": None})
                channel.send(KeeperReply(record=record, warm=found == "warm"))
            if not self._read_demand(channel):
                return True
            self._keeper.wait_for_change(_LEASE_POLL_SECONDS)

    def _read_demand(self, channel: KeeperChannel) -> bool:
        """Read the demand that a worker has sent, perhaps several times. False when it is gone."""
        while True:
            try:
                request = channel.request(0)
            except TimeoutError:
                return True
            if request is None:
                return False
            if not isinstance(request, Demand):
                raise KeeperError("a connection that holds a lease may send only demand")
            self._keeper.update_demand(request.claims)
