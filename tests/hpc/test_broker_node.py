"""The node that the control image brings, on its own directory and the test's own ports."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from services.broker.private_node import free_ports
from services.node.supervision import SupervisedProcess
from tests.conftest import REPOSITORY
from tests.integration.conftest import Command, wait_until

NODE = REPOSITORY / "apptainer" / "broker.sh"


def listens(port: int) -> bool:
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in psutil.net_connections("tcp")
    )


def test_a_node_of_ones_own_takes_the_roles_and_ends_in_order(
    tmp_path: Path, command: Callable[..., Command]
) -> None:
    directory = tmp_path / "node"
    directory.mkdir()
    amqp, management, mapper, distribution = free_ports(4)
    (directory / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{amqp}\n"
        f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {management}\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "ERL_EPMD_PORT": str(mapper),
        "RABBITMQ_DIST_PORT": str(distribution),
    }
    output = (tmp_path / "node.log").open("ab")
    node = SupervisedProcess(
        [str(NODE), str(directory)], environment=environment, grace_seconds=20, output=output
    )
    try:
        wait_until(lambda: listens(amqp) and listens(management), "a node that listens")
        for secret in ("admin.password", "rabbitmq.conf"):
            assert (directory / secret).stat().st_mode & 0o777 == 0o600, secret
        for_setup = (
            *("broker", "setup", "--management", f"http://127.0.0.1:{management}"),
            *("--secrets", str(tmp_path / "secrets")),
        )
        as_guest = command(*for_setup)
        assert as_guest.wait() == 5 and "refused guest" in as_guest.output, as_guest.output
        setup = command(
            *(*for_setup, "--admin", "keepwarm-admin"),
            KEEPWARM_BROKER_ADMIN_PASSWORD_FILE=str(directory / "admin.password"),
        )
        assert setup.wait() == 0, setup.output
        assert (tmp_path / "secrets" / "worker.password").stat().st_mode & 0o777 == 0o600
        done = subprocess.run(
            [str(NODE), str(directory), "rabbitmqctl", "-q", "list_users"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "keepwarm-worker" in done.stdout, done.stdout + done.stderr
        assert "keepwarm-admin" in done.stdout and "guest" not in done.stdout
        # A command for the node leaves its files as they are.
        assert (directory / "rabbitmq.conf").read_text().count("default_user") == 1
        assert list(directory.glob("data/*")), "data in its own directory"
    finally:
        node.terminate()
        code = node.wait(120)
        node.stop()
        output.close()
    assert code == 0, (tmp_path / "node.log").read_text()
    assert not listens(amqp) and not listens(mapper)
