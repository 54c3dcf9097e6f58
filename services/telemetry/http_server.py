"""An HTTP server with bounded connections, so that a client cannot block it."""

import socket
import threading
import time
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog

MAX_CONNECTIONS = 32
READ_TIMEOUT_SECONDS = 5.0
"""How long a client may send nothing within its request."""
MAX_CONNECTION_SECONDS = 20.0
"""A connection is closed after this time, whatever its state."""

log = structlog.get_logger(__name__)


class BoundedServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection, and one request per connection."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily) -> None:
        """Raises OSError if it cannot listen."""
        self.address_family = family
        self._open: dict[Any, float] = {}
        self._counting = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The base class looks its name up, which takes seconds if the resolver does not answer.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = bound = self.socket.getsockname()
        self.server_name, self.server_port = bound[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._counting:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                self._open[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._counting:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called several times a second: close connections that are open for too long."""
        oldest = time.monotonic() - MAX_CONNECTION_SECONDS
        with self._counting:
            late = [request for request, since in self._open.items() if since < oldest]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client disconnected, or was too slow.
        log.debug("metrics.request_failed", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_SECONDS

    def address_string(self) -> str:
        return str(self.client_address[0])  # without a name lookup

    def log_message(self, format: str, *args: Any) -> None:
        pass
