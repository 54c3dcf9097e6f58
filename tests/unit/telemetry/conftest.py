"""A service that says what a test wants it to, and its server."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import httpx
import pytest

from services.contracts import load_settings
from services.telemetry import MetricsServer


class Told:
    """A service: well, and ready, unless told otherwise."""

    liveness_error: str | None = None
    readiness_error: str | None = None


@pytest.fixture
def service() -> Told:
    return Told()


@pytest.fixture
def serve(service: Told) -> Iterator[Callable[..., MetricsServer]]:
    """`serve(pages, metrics_address=…)`: servers that are closed after the test."""
    with ExitStack() as opened:

        def start(
            pages: Mapping[str, Callable[[], object]] | None = None, **settings: str
        ) -> MetricsServer:
            server = opened.enter_context(MetricsServer(load_settings(**settings)))
            server.serve(service, pages)
            return server

        yield start


def ask(server: MetricsServer, path: str, method: str = "GET", **how: object) -> httpx.Response:
    return httpx.request(method, f"http://{server.advertised}{path}", timeout=30, **how)
