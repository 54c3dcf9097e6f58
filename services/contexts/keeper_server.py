"""The keeper's socket: leases, evictions, the end."""

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
    Demand,
    DescribeDevice,
    Drain,
    Evict,
    GiveBack,
    KeeperChannel,
    KeeperReply,
    KeptBroker,
)
from services.contexts.records import State
from services.contracts import ContextSpec
from services.contracts.errors import EngineStartError, KeeperError, KeepwarmError
from services.node.device import find_device
from services.node.runtime_dir import is_same_file, keeper_socket
from services.telemetry import Watchdog

_LEASE_POLL_SECONDS = 0.05
_BROKER_CHECK_SECONDS = 0.5
_REQUEST_SECONDS = 10.0
# A keeper without engines and without company waits a little for the next worker.
_LINGER_SECONDS = 15.0

log = structlog.get_logger(__name__)


class LentNode(Protocol):
    """A broker that somebody has; `PrivateNode` is one."""

    @property
    def url(self) -> str: ...
    @property
    def password(self) -> str: ...


class Broker(Protocol):
    """A broker that is kept as engines are; `KeptNode` is one."""

    @property
    def exists(self) -> bool: ...
    def acquire(self) -> LentNode | None: ...
    def restart_if_down(self) -> None: ...
    def release(self, claims_queue: str | None) -> None: ...
    def discard(self) -> None: ...
    def end_if_idle(self) -> None: ...
    def close(self) -> None: ...


class KeeperServer:
    """Serves until told to stop, or until nobody has needed it for a while."""

    def __init__(self, keeper: Keeper, *, for_ever: bool, broker: Broker | None = None) -> None:
        """`for_ever`: stay when there is nothing to keep, for whoever runs it as a service. Without
        a `broker` none is lent.
        """
        self._keeper = keeper
        self._broker = broker
        self._for_ever = for_ever
        self._stop = threading.Event()
        self._watchdog = Watchdog()
        self._connections = 0
        self._counting = threading.Lock()

    @property
    def liveness_error(self) -> str | None:
        """See `telemetry.server.Service`. A drain takes its time."""
        return None if self._stop.is_set() else self._watchdog.liveness_error

    @property
    def readiness_error(self) -> str | None:
        return "it drains" if self._stop.is_set() else None

    def stop(self) -> None:
        """Begin to end. Any thread may call it."""
        self._stop.set()

    def serve(self) -> None:
        """Take connections; at the end stop every engine. A runtime directory that is removed
        meanwhile, as clean-ups of /tmp do, is made again.

        Raises UsageError or KeeperError where it cannot be had again.
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
        """Until our socket is removed, or our time is over."""
        path = keeper_socket(self._keeper.directory)
        with socket.socket(socket.AF_UNIX) as listener:
            # Under its name once it listens: who finds the socket can connect to it.
            new = path.with_suffix(".new")
            new.unlink(missing_ok=True)
            listener.bind(str(new))
            new.chmod(0o600)
            listener.listen(64)
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
            self._keeper.tidy()
            if self._broker is not None:
                self._broker.end_if_idle()
            kept = not self._keeper.empty or (self._broker is not None and self._broker.exists)
            if self._connections or kept or self._for_ever:
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
                    channel.send(KeeperReply(ended_because=str(error)))
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
                channel.send(KeeperReply(ended_because=str(error)))
        elif isinstance(request, Borrow):
            self._lend(channel)
        elif isinstance(request, Evict):
            channel.send(KeeperReply(done=self._keeper.evict(request.wanted)))
        elif isinstance(request, Drain):
            try:
                self._keeper.drain()
            finally:
                self.stop()  # a keeper that has drained is of no use, whoever is there to hear it
            channel.send(KeeperReply())

    def _lend(self, channel: KeeperChannel) -> None:
        """The broker, until it is given back or the borrower is gone."""
        if self._broker is None:
            channel.send(KeeperReply(ended_because="this keeper keeps no broker"))
            return
        try:
            node = self._broker.acquire()
        except KeepwarmError as error:
            channel.send(KeeperReply(ended_because=str(error)))
            return
        if node is None:
            channel.send(KeeperReply(ended_because="another run has the broker"))
            return
        give_back: GiveBack | None = None
        try:
            lent = KeptBroker(url=node.url, password=SecretStr(node.password))
            channel.send(KeeperReply(broker=lent))
            give_back = self._wait_for_give_back(channel, self._broker)
        finally:
            if give_back is None:
                self._broker.throw_away()
            else:
                self._broker.take_back(give_back.claims_queue)

    def _wait_for_give_back(self, channel: KeeperChannel, broker: Broker) -> GiveBack | None:
        """None where the borrower has gone without a word."""
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
        """Tell the worker how its engine is, until one of the two is gone. How the start went is
        for the one whom it was for: others would tell of the same start again. It is warm for this
        worker once it has answered as it did at its start, and has the worker's adapter, if there
        is one. False when it answered otherwise: then the worker gets another.
        """
        sent = None
        checked = found != "warm"
        loaded = spec.adapter is None
        while True:
            record = engine.record
            if engine.ended_because is not None:
                if engine.answers_changed and (sent is None or sent.state != "warm"):
                    return False
                channel.send(KeeperReply(ended_because=engine.ended_because))
                return True
            if not checked and record.state == "warm":
                checked = engine.check()
                if not checked:
                    engine.join(_BROKER_CHECK_SECONDS)
                    continue
            if not loaded and record.state == "warm":
                try:
                    engine.load_adapter(spec, lambda: channel.is_closed)
                except EngineStartError as error:
                    channel.send(KeeperReply(ended_because=str(error)))
                    return True
                loaded = True
            if sent is None or (record.state, record.progress) != (sent.state, sent.progress):
                sent = record
                record_sent = (
                    record if found is None else record.model_copy(update={"phases": None})
                )
                channel.send(KeeperReply(record=record_sent, warm=found == "warm"))
            if not self._read_demand(channel):
                return True
            self._keeper.wait_for_change(_LEASE_POLL_SECONDS)

    def _read_demand(self, channel: KeeperChannel) -> bool:
        """What a worker has said since; several requests may have come at once. False when it has
        gone.
        """
        while True:
            try:
                request = channel.request(0)
            except TimeoutError:
                return True
            if request is None:
                return False
            if not isinstance(request, Demand):
                raise KeeperError("a lease carries nothing but demand")
            self._keeper.update_demand(request.claims)
