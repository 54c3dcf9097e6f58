"""The private node: closed to others while it runs, gone when its owner is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.broker import PrivateNode, private_node
from services.contracts.errors import BrokerError
from tests.conftest import REPOSITORY
from tests.integration.conftest import wait_until


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


def test_it_listens_on_loopback_only(node: PrivateNode) -> None:
    processes = processes_of(node._directory)
    assert any("beam" in process.name() for process in processes)
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}


def test_its_secrets_are_for_its_owner_alone(node: PrivateNode) -> None:
    assert node._directory.stat().st_mode & 0o077 == 0
    assert (node._directory / "rabbitmq.conf").stat().st_mode & 0o077 == 0
    for process in processes_of(node._directory):
        assert node.password not in " ".join(process.cmdline())


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    with PrivateNode(tmp_path / "node"):
        assert processes_of(tmp_path / "node")
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
    monkeypatch.setattr(private_node, "_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match="apt-get install rabbitmq-server"):
        PrivateNode(tmp_path / "node").start()
