import contextlib
import socket
import stat
import sys
from pathlib import Path

import pytest

from services.broker import PrivateNode, private_node
from services.contracts.errors import BrokerError


@pytest.fixture
def server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    server = tmp_path / "rabbitmq-server"
    server.write_text("#!/bin/sh\necho starting\necho 'no room for a node'\nexit 5\n")
    server.chmod(0o755)
    monkeypatch.setattr(private_node, "_SERVER_PATHS", (str(server),))
    return server


def test_without_a_server_the_error_says_how_to_install_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_node, "_SERVER_PATHS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match="apt-get install rabbitmq-server"):
        PrivateNode(tmp_path / "node").start()


def test_a_server_elsewhere_on_the_path_is_found(
    server_that_fails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_node, "_SERVER_PATHS", ())
    monkeypatch.setenv("PATH", f"{server_that_fails.parent}:/usr/bin:/bin")
    with pytest.raises(BrokerError, match="no room for a node"):
        PrivateNode(tmp_path / "node").start()


@pytest.mark.usefixtures("server_that_fails")
def test_a_node_that_does_not_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    with pytest.raises(BrokerError) as failed:
        node.start()
    assert "exit code 5" in str(failed.value)
    assert str(node.log_file) in str(failed.value)
    assert "no room for a node" in str(failed.value)


@pytest.mark.parametrize(
    ("reason", "starts"), [("net_kernel,{'EXIT',nodistribution}", 2), ("no room for a node", 1)]
)
def test_a_node_that_could_not_register_with_its_port_mapper_is_started_once_more(
    reason: str, starts: int, server_that_fails: Path, tmp_path: Path
) -> None:
    server_that_fails.write_text(f'#!/bin/sh\necho "{reason}"\nexit 1\n')
    node = PrivateNode(tmp_path / "node")
    with pytest.raises(BrokerError, match="exit code 1"):
        node.start()
    assert node.log_file.read_text().count(reason) == starts


@pytest.mark.usefixtures("server_that_fails")
def test_the_nodes_directory_and_password_are_for_its_owner_alone(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    with pytest.raises(BrokerError):
        node.start()
    configuration = tmp_path / "node" / "rabbitmq.conf"
    assert stat.S_IMODE((tmp_path / "node").stat().st_mode) == 0o700
    assert stat.S_IMODE(configuration.stat().st_mode) == 0o600
    assert node.password in configuration.read_text()


@pytest.mark.usefixtures("server_that_fails")
def test_a_node_listens_on_loopback_only(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    with pytest.raises(BrokerError):
        node.start()
    listeners = [
        line
        for line in (tmp_path / "node" / "rabbitmq.conf").read_text().splitlines()
        if line.startswith("listeners.")
    ]
    assert listeners == [f"listeners.tcp.1 = 127.0.0.1:{node.port}"]


@pytest.mark.usefixtures("server_that_fails")
def test_a_nodes_log_may_lie_where_it_outlives_the_node(tmp_path: Path) -> None:
    log_file = tmp_path / "rabbitmq.log"
    with pytest.raises(BrokerError, match="no room for a node"):
        PrivateNode(tmp_path / "node", log_file).start()
    assert log_file.read_text() == "starting\nno room for a node\n"


def test_every_node_has_a_password_and_ports_of_its_own(tmp_path: Path) -> None:
    one, other = PrivateNode(tmp_path / "a"), PrivateNode(tmp_path / "b")
    assert one.password != other.password
    assert len(one.password) >= 32
    assert one.password not in one.url
    assert one.password not in repr(one)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that needs its port for other nodes, too, as the real one does."""
    server = tmp_path / "rabbitmq-server"
    server.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, time\n"
        "ports = os.environ['RABBITMQ_DIST_PORT'], os.environ['RABBITMQ_NODENAME'][9:14]\n"
        "sockets = [socket.create_server(('127.0.0.1', int(port))) for port in ports]\n"
        "time.sleep(600)\n"
    )
    server.chmod(0o755)
    monkeypatch.setattr(private_node, "_SERVER_PATHS", (str(server),))
    return server


@pytest.mark.usefixtures("server")
def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    taken = node._distribution_port
    with socket.create_server(("127.0.0.1", taken)), node:
        assert node.alive
        assert node._distribution_port != taken


@pytest.mark.usefixtures("server")
def test_a_node_whose_ports_are_known_keeps_them(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    with node:
        url, taken = node.url, node._distribution_port
    with socket.create_server(("127.0.0.1", taken)), pytest.raises(BrokerError, match="in use"):
        node.start()
    assert node.url == url


def test_ports_are_free_and_none_that_a_connection_is_given() -> None:
    given_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = private_node.free_ports(20)
    assert len(set(ports)) == 20
    assert max(ports) < given_from
    with contextlib.ExitStack() as held:
        for port in ports:
            held.enter_context(socket.create_server(("127.0.0.1", port)))
        assert not any(map(private_node._is_free, ports))


def test_ports_are_found_where_connections_are_given_nearly_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(private_node, "_EPHEMERAL_PORTS", tmp_path / "range")
    assert len(private_node.free_ports(5)) == 5


def test_stopping_what_was_never_started_is_quiet(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    node.stop()
    assert not node.alive


@pytest.mark.usefixtures("server_that_fails")
@pytest.mark.parametrize(
    "plugins",
    [(), ("rabbitmq_prometheus",), ("rabbitmq_management", "rabbitmq_prometheus")],
)
def test_a_node_has_the_plug_ins_that_were_asked_for_and_by_default_none(
    plugins: tuple[str, ...], tmp_path: Path
) -> None:
    node = PrivateNode(tmp_path / "node", plugins=plugins)
    with pytest.raises(BrokerError):
        node.start()
    assert (tmp_path / "node" / "enabled_plugins").read_text() == f"[{','.join(plugins)}].\n"
    listeners = [
        line
        for line in (tmp_path / "node" / "rabbitmq.conf").read_text().splitlines()
        if line.startswith(("management.", "prometheus."))
    ]
    assert listeners == [
        line
        for plugin in plugins
        for line in (
            f"{plugin.removeprefix('rabbitmq_')}.tcp.ip = 127.0.0.1",
            f"{plugin.removeprefix('rabbitmq_')}.tcp.port = {node.plugin_ports[plugin]}",
        )
    ]
