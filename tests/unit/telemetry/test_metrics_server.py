"""The server over real sockets on loopback."""

import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from services.contracts import load_settings
from services.contracts.errors import UsageError
from services.telemetry import MetricsServer, http_server
from tests.unit.telemetry.conftest import FakeService, ask

Serve = Callable[..., MetricsServer]


def connect(server: MetricsServer) -> socket.socket:
    assert server.advertised is not None
    host, _, port = server.advertised.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def server_threads() -> int:
    return sum("process_request" in thread.name for thread in threading.enumerate())


def test_metrics_are_in_the_form_that_prometheus_reads(serve: Serve) -> None:
    answer = ask(serve(), "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert "process_cpu_seconds" in names
    assert not {name for name in names if name.endswith("_created")}


def test_a_head_has_no_body(serve: Serve) -> None:
    server = serve({"/sd": list})
    for path in ("/metrics", "/healthz", "/sd", "/nowhere"):
        answer = ask(server, path, "HEAD")
        assert answer.content == b"", path


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/sd"])
def test_nothing_but_get_and_head_is_taken(path: str, method: str, serve: Serve) -> None:
    answer = ask(serve({"/sd": list}), path, method)
    assert (answer.status_code, answer.text) == (405, "only GET and HEAD\n")


def test_an_unknown_path_is_answered_with_the_known_ones(serve: Serve) -> None:
    answer = ask(serve({"/sd": list}), "/")
    assert answer.status_code == 404
    assert answer.text == "not found; available: /metrics, /healthz, /readyz, /sd\n"


def test_a_service_that_waits_is_alive_and_not_ready(serve: Serve, service: FakeService) -> None:
    server = serve()
    assert [ask(server, path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    service.readiness_error = "no connection\nto the broker"
    assert ask(server, "/healthz").text == "ok\n"
    answer = ask(server, "/readyz")
    assert (answer.status_code, answer.text) == (503, "no connection to the broker\n")


def test_a_service_that_is_stuck_is_neither(serve: Serve, service: FakeService) -> None:
    server = serve()
    service.liveness_error = "the main loop has stalled for 121 s"
    for path in ("/healthz", "/readyz"):
        answer = ask(server, path)
        assert (answer.status_code, answer.text) == (503, f"{service.liveness_error}\n")


def test_a_page_is_json(serve: Serve) -> None:
    answer = ask(serve({"/sd": lambda: [{"targets": ["node:1"]}]}), "/sd")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == [{"targets": ["node:1"]}]


def test_a_bug_in_a_page_is_logged_and_the_others_are_served(serve: Serve) -> None:
    def bug() -> object:
        raise KeyError("a bug")

    server = serve({"/sd": bug})
    with capture_logs() as logs:
        answer = ask(server, "/sd")
    assert (answer.status_code, answer.text) == (500, "internal error; see the log\n")
    assert [(log["event"], log["path"]) for log in logs] == [("metrics.page_failed", "/sd")]
    assert ask(server, "/healthz").status_code == 200


def test_servers_on_one_node_do_not_collide(serve: Serve) -> None:
    assert len({serve().advertised for _ in range(8)}) == 8


def test_where_it_is_off_nothing_listens_and_all_else_is_the_same(serve: Serve) -> None:
    server = serve(metrics_address="off")
    assert server.advertised is None
    server.close()


def test_a_port_that_is_taken_is_said_with_the_next_step(serve: Serve) -> None:
    taken = serve().advertised
    with pytest.raises(UsageError, match=r"KEEPWARM_METRICS_ADDRESS: cannot listen .* port 0"):
        MetricsServer(load_settings(metrics_address=taken))


@pytest.mark.parametrize("address", ["192.0.2.1:0", "no-such-host.invalid:0"])
def test_an_address_that_is_not_ours_is_said_with_the_next_step(address: str) -> None:
    with pytest.raises(UsageError, match="an address of this machine"):
        MetricsServer(load_settings(metrics_address=address))


@pytest.mark.parametrize(
    ("wanted", "advertised"),
    [(None, r"127\.0\.0\.1:PORT"), ("node-7", "node-7:PORT"), ("node-7:80", "node-7:80")],
)
def test_the_advertised_address_is_the_operators(
    wanted: str | None, advertised: str, serve: Serve
) -> None:
    server = serve(metrics_advertise=wanted)
    assert server._server is not None and server.advertised is not None
    port = str(server._server.server_address[1])
    assert server.advertised == advertised.replace("PORT", port).replace("\\", "")


def test_a_wildcard_address_is_advertised_as_the_host_name(serve: Serve) -> None:
    server = serve(metrics_address="0.0.0.0:0")
    assert server.advertised is not None
    assert server.advertised.rpartition(":")[0] == socket.gethostname()


def test_after_its_end_nobody_listens_and_no_thread_stays(serve: Serve) -> None:
    server = serve()
    ask(server, "/metrics")
    address = server.advertised
    server.close()
    server.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{address}/metrics")
    assert "metrics" not in {thread.name for thread in threading.enumerate()}


def test_a_silent_client_is_disconnected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server._Handler, "timeout", 0.1)
    with connect(serve()) as silent:
        assert silent.recv(1) == b""


def test_a_slow_client_is_disconnected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTION_SECONDS", 0.3)
    with connect(serve()) as slow, pytest.raises(OSError):
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            slow.sendall(b"x")
            time.sleep(0.05)
    while server_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server_threads() == 0


def test_of_too_many_connections_the_last_are_closed_and_later_ones_are_served(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)
    server = serve()
    with connect(server) as first, connect(server) as second:
        for held in (first, second):
            held.sendall(b"GET /healthz")
        with connect(server) as third:
            assert third.recv(1) == b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert ask(server, "/healthz").status_code == 200
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError("nobody is served any more")
