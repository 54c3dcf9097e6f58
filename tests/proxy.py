"""A network that fails on command: a TCP proxy on loopback, in front of a server that is well."""

import select
import socket
import struct
import threading
import time
from typing import Self

_POLL_SECONDS = 0.02
_CHUNK_BYTES = 65_536
_MOST_HELD_BYTES = 1 << 20


class Proxy:
    """Passes bytes between whoever connects to `port` and the server at `server_port`, both on
    127.0.0.1, until it is told to misbehave.

    `cut` resets every connection and takes new ones. `black_hole` swallows like a network without a
    route: connections stay open, and not a byte comes through in either direction; new ones are
    accepted, and get no answer. `heal` lets everything through that was held up; what is to be lost
    for good has to be `cut` before. Use it as a context manager.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._holed = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._passages: list[_Passage] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(_POLL_SECONDS)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="proxy")
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many are open now."""
        with self._lock:
            return sum(passage.thread.is_alive() for passage in self._passages)

    def cut(self) -> None:
        """Reset every connection there is; what it held is lost. Returns when all are gone."""
        with self._lock:
            passages, self._passages = self._passages, []
        for passage in passages:
            passage.cut.set()
        for passage in passages:
            passage.thread.join()

    def black_hole(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        self._holed.set()

    def heal(self) -> None:
        self._holed.clear()

    def close(self) -> None:
        """Reset every connection and listen no more."""
        self._closed.set()
        self._accepting.join()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with self._lock:
                self._passages = [p for p in self._passages if p.thread.is_alive()]
                self._passages.append(_Passage(client, self._server_port, self._holed))


class _Passage:
    """One connection through the proxy, seen to by one thread."""

    def __init__(self, client: socket.socket, server_port: int, holed: threading.Event) -> None:
        self._client = client
        self._server_port = server_port
        self._holed = holed
        self.cut = threading.Event()
        self.thread = threading.Thread(target=self._run, name="passage")
        self.thread.start()

    def _run(self) -> None:
        with self._client:
            try:
                while self._holed.is_set() and not self.cut.is_set():
                    time.sleep(_POLL_SECONDS)
                with socket.create_connection(("127.0.0.1", self._server_port)) as server:
                    self._pass_on(server)
            except OSError:  # either end is gone: so is the other
                _reset(self._client)

    def _pass_on(self, server: socket.socket) -> None:
        ways = [_Way(self._client, server), _Way(server, self._client)]
        while not all(way.ended for way in ways):
            if self.cut.is_set():
                _reset(server)
                raise ConnectionResetError
            if self._holed.is_set():
                time.sleep(_POLL_SECONDS)
                continue
            readable, writable, _ = select.select(
                [way.source for way in ways if way.wants_to_read],
                [way.target for way in ways if way.held],
                [],
                _POLL_SECONDS,
            )
            if self._holed.is_set():
                continue
            try:
                for way in ways:
                    way.move(way.source in readable, way.target in writable)
            except OSError:
                _reset(server)
                raise


class _Way:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.held = b""
        self.ended = False
        self._source_ended = False
        target.setblocking(False)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def wants_to_read(self) -> bool:
        return not self._source_ended and len(self.held) < _MOST_HELD_BYTES

    def move(self, can_read: bool, can_write: bool) -> None:
        if can_write and self.held:
            self.held = self.held[self.target.send(self.held) :]
        if can_read:
            piece = self.source.recv(_CHUNK_BYTES)
            self.held += piece
            self._source_ended = not piece
        if self._source_ended and not self.held and not self.ended:
            self.target.shutdown(socket.SHUT_WR)
            self.ended = True


def _reset(end: socket.socket) -> None:
    """Make the coming `close` send RST instead of FIN, and forget what was not sent."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
