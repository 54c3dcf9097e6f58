"""A service that says what a test wants it to, and its server."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import httpx
import pytest

from services.contracts import load_settings
from services.telemetry import MetricsServer


class FakeService:
    """A service that is alive and ready unless a test sets an error."""

    liveness_error: str | None = None
    readiness_error: str | None = None


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def serve(service: FakeService) -> Iterator[Callable[..., MetricsServer]]:
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
