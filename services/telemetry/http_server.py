"""An HTTP server that strangers cannot hold up: few connections, none for long."""

import socket
import threading
import time
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog

MOST_CONNECTIONS = 32
SILENT_SECONDS = 5.0
"""How long a client may say nothing in the midst of its request."""
LONGEST_SECONDS = 20.0
"""A connection is closed after so long, whatever it is doing."""

log = structlog.get_logger(__name__)


class BoundedServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection, and one request on each."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily) -> None:
        """Raises OSError where it cannot listen."""
        self.address_family = family
        self._open: dict[Any, float] = {}
        self._counting = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The base class would look its name up, which takes seconds where a resolver is silent.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = bound = self.socket.getsockname()
        self.server_name, self.server_port = bound[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._counting:
            full = len(self._open) >= MOST_CONNECTIONS
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
        """Several times a second: end what takes too long."""
        oldest = time.monotonic() - LONGEST_SECONDS
        with self._counting:
            late = [request for request, since in self._open.items() if since < oldest]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("metrics.request_failed", exc_info=True)  # a client that went, or was too slow


class _Handler(WSGIRequestHandler):
    timeout = SILENT_SECONDS

    def address_string(self) -> str:
        return str(self.client_address[0])  # no look-up of its name

    def log_message(self, format: str, *args: Any) -> None:
        pass
