"""The HTTP server of every service: `/metrics`, `/healthz`, `/readyz`, and its own pages."""

import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address
from typing import Protocol, Self
from wsgiref.types import StartResponse, WSGIEnvironment

import structlog
from prometheus_client import REGISTRY, disable_created_metrics, make_wsgi_app

from services.contracts import Settings
from services.contracts.addresses import is_host, join_address, split_address
from services.contracts.errors import UsageError
from services.contracts.settings import METRICS_OFF
from services.telemetry.http_server import BoundedServer

_POLL_SECONDS = 0.2
_TEXT = "text/plain; charset=utf-8"

Page = Callable[[], object]
"""Returns the contents of a page, as a value that JSON can represent."""

log = structlog.get_logger(__name__)


class Service(Protocol):
    """What a service provides to its probes. Called from the server's threads; must not wait."""

    @property
    def liveness_error(self) -> str | None:
        """Why the service is not alive; None while its main loop is running."""

    @property
    def readiness_error(self) -> str | None:
        """Why the service cannot do its work now; None while it can."""


class MetricsServer:
    """Listens once created and answers after `serve`. Does neither if metrics are off."""

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError if it cannot listen at KEEPWARM_METRICS_ADDRESS."""
        self._server: BoundedServer | None = None
        self._thread: threading.Thread | None = None
        self.advertised: str | None = None
        """`host:port` at which others reach it; None if metrics are off."""
        if settings.metrics_address == METRICS_OFF:
            return
        self._server = _bind(settings.metrics_address)
        self.advertised = _advertised_address(
            settings.metrics_advertise, *_bound_address(self._server)
        )

    def serve(self, service: Service, pages: Mapping[str, Page] | None = None) -> None:
        """Start to answer. `pages` maps further paths to their contents."""
        if self._server is None:
            return
        # Creation times would add a series for each counter.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._server.set_app(_wsgi_application(service, pages or {}))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()
        log.info(
            "metrics.serving",
            address=join_address(*_bound_address(self._server)),
            advertised=self.advertised,
        )

    def close(self) -> None:
        if self._server is None:
            return
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server = self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bound_address(server: BoundedServer) -> tuple[str, int]:
    host, port = server.server_address[:2]
    return str(host), int(port)


def _bind(address: str) -> BoundedServer:
    host, port = split_address(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return BoundedServer((str(where[0]), port), family)
    except OSError as error:
        raise UsageError(
            f"KEEPWARM_METRICS_ADDRESS: cannot listen at {address}: {error.strerror or error}; "
            "use port 0 for a free port, an address of this machine, or `off`"
        ) from error


def _advertised_address(wanted: str | None, host: str, port: int) -> str:
    if wanted is not None and not is_host(wanted):
        return wanted
    if wanted is not None:
        return join_address(wanted.strip("[]"), port)
    return join_address(socket.gethostname() if ip_address(host).is_unspecified else host, port)


def _wsgi_application(
    service: Service, pages: Mapping[str, Page]
) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    metrics = make_wsgi_app(REGISTRY)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _respond(start_response, "405 Method Not Allowed", "only GET and HEAD")
        if path == "/metrics":
            body: Iterable[bytes] = metrics({**environ, "REQUEST_METHOD": "GET"}, start_response)
            return body
        if path == "/healthz":
            return _probe_response(start_response, service.liveness_error)
        if path == "/readyz":
            return _probe_response(
                start_response, service.liveness_error or service.readiness_error
            )
        if path in pages:
            return _respond(start_response, "200 OK", json.dumps(pages[path]()), "application/json")
        known = ", ".join(("/metrics", "/healthz", "/readyz", *pages))
        return _respond(start_response, "404 Not Found", f"not found; available: {known}")

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            body = answer(environ, start_response)
        except Exception:
            # A bug in a page must not end anything else.
            log.exception("metrics.page_failed", path=environ["PATH_INFO"])
            body = _respond(
                start_response, "500 Internal Server Error", "internal error; see the log"
            )
        return () if environ["REQUEST_METHOD"] == "HEAD" else body

    return application


def _probe_response(start_response: StartResponse, error: str | None) -> Iterable[bytes]:
    if error is None:
        return _respond(start_response, "200 OK", "ok")
    return _respond(start_response, "503 Service Unavailable", " ".join(error.split()))


def _respond(
    start_response: StartResponse, status: str, text: str, kind: str = _TEXT
) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return (body,)
