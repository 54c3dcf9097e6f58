"""The private node: closed to others while it runs, gone when its owner is."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from services.broker import PrivateNode, private_node
from services.contracts.errors import BrokerError
from tests.conftest import REPOSITORY
from tests.integration.conftest import plain_connection, wait_until


def processes_of(directory: Path) -> list[psutil.Process]:
    """Every process that was started with this directory as its home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(directory):
                found.append(process)
        except psutil.Error:
            continue
    return found


def listeners(directory: Path) -> set[tuple[str, str, int]]:
    """Program, address and port of every socket that a node's processes listen on now."""
    found = set()
    for process in processes_of(directory):
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((process.name(), *connection.laddr))
    return found


@contextmanager
def listeners_meanwhile(directory: Path) -> Iterator[set[tuple[str, str, int]]]:
    """Those that were seen while the block ran: some live for a fraction of a second."""
    seen: set[tuple[str, str, int]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            seen.update(listeners(directory))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a server, which has its scripts here and the rest from the installed one, looks for the
    files of its site: the etc/rabbitmq of another machine.
    """
    installed = private_node.find_server().resolve().parent.parent
    server, prefix = tmp_path / "server", tmp_path / "site"
    shutil.copytree(installed / "sbin", server / "sbin")
    for other in installed.iterdir():
        if other.name != "sbin":
            (server / other.name).symlink_to(other)
    defaults = server / "sbin" / "rabbitmq-defaults"
    text = defaults.read_text()
    assert "\nSYS_PREFIX=\n" in text
    defaults.write_text(text.replace("\nSYS_PREFIX=\n", f"\nSYS_PREFIX={prefix}\n"))
    monkeypatch.setattr(private_node, "_SERVER_PATHS", (str(server / "sbin" / "rabbitmq-server"),))
    etc = prefix / "etc" / "rabbitmq"
    (etc / "conf.d").mkdir(parents=True)
    return etc


def test_every_socket_that_it_ever_listens_on_is_on_loopback(tmp_path: Path) -> None:
    node = PrivateNode(tmp_path / "node")
    with listeners_meanwhile(tmp_path / "node") as seen, node:
        node.control("status")
    assert {name for name, *_ in seen} == {"beam.smp", "epmd"}
    assert node.port in {port for *_, port in seen}
    assert {address for _, address, _ in seen} <= {"127.0.0.1", "::1"}


def test_the_sites_own_files_for_the_systems_broker_are_not_read(
    site: Path, tmp_path: Path
) -> None:
    (site / "conf.d" / "10-site.conf").write_text(
        "listeners.tcp.default = 5672\ndefault_user = site\ndefault_pass = of-the-site\n"
    )
    (site / "rabbitmq.conf").write_text("listeners.tcp.default = 5673\n")
    (site / "advanced.config").write_text('[{rabbit, [{tcp_listeners, [{"0.0.0.0", 5674}]}]}].\n')
    (site / "enabled_plugins").write_text("[rabbitmq_management].\n")
    (site / "rabbitmq-env.conf").write_text("NODE_PORT=5675\nERL_EPMD_ADDRESS=0.0.0.0\n")
    node = PrivateNode(tmp_path / "node")
    with node:
        plain_connection(node).close()
        found = listeners(tmp_path / "node")
        assert {address for _, address, _ in found} <= {"127.0.0.1", "::1"}
        assert {port for *_, port in found} == {
            node.port,
            node._distribution_port,
            node._mapper_port,
        }


def test_its_secrets_are_for_its_owner_alone(node: PrivateNode) -> None:
    assert node._directory.stat().st_mode & 0o077 == 0
    assert (node._directory / "rabbitmq.conf").stat().st_mode & 0o077 == 0
    for process in processes_of(node._directory):
        assert node.password not in " ".join(process.cmdline())


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    with PrivateNode(tmp_path / "node"):
        assert processes_of(tmp_path / "node")
    assert not processes_of(tmp_path / "node")


def test_rabbitmqctl_starts_no_port_mapper_that_would_stay_when_the_node_is_down(
    tmp_path: Path,
) -> None:
    with PrivateNode(tmp_path / "node") as node:
        assert node.control("eval", "1 + 1.").strip() == "2"
        node.stop()
        with pytest.raises(BrokerError, match="rabbitmqctl status failed"):
            node.control("status")
        assert not processes_of(tmp_path / "node")


def test_nothing_is_left_of_it_when_its_owner_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from services.broker import PrivateNode\n"
        "PrivateNode(Path(sys.argv[1])).start(); print('up', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "node")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner.stdout:
        wait_until(lambda: "up" in owner.stdout.readline(), "the node")
        assert processes_of(tmp_path / "node")
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    wait_until(lambda: not processes_of(tmp_path / "node"), "all of it gone")


def test_a_node_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "data").write_text("where its data directory should be")
    with pytest.raises(BrokerError, match=r"did not start[\s\S]*rabbitmq\.log"):
        PrivateNode(tmp_path / "node").start()
    assert not processes_of(tmp_path / "node")


def test_without_a_server_the_next_step_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_node, "_SERVER_PATHS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match="apt-get install rabbitmq-server"):
        PrivateNode(tmp_path / "node").start()
