"""A private RabbitMQ node, run from the installed server.

It needs no root, listens on loopback only, reads no file of the system's broker, and ends with its
owner.
"""

import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import psutil
import structlog

from services.contracts.errors import BrokerError
from services.node.supervision import SupervisedProcess

# Plug-ins that listen, with the prefix of their settings. The node refuses settings of a plug-in
# that is off.
_LISTENING_PLUGINS = {"rabbitmq_management": "management", "rabbitmq_prometheus": "prometheus"}
_LOWEST_PORT = 10_000
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
# In the log of a node that could not register with its port mapper.
_NO_MAPPER = "nodistribution"
_START_TIMEOUT_SECONDS = 120.0
_STOP_SECONDS = 20.0
# Debian's /usr/sbin/rabbitmq-server is a wrapper that requires root or the user rabbitmq.
_SERVER_PATHS = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "/opt/rabbitmq/sbin/rabbitmq-server")

log = structlog.get_logger(__name__)


class PrivateNode:
    """A node that listens on loopback only, on ports that were free, with a random password.

    Its data is in `directory`, which only the owner can read. Use it as a context manager: it is
    stopped at the end, and by its supervisor if this process is killed. `plugins` are its only
    plug-ins; rabbitmq_management and rabbitmq_prometheus listen on `plugin_ports`.
    """

    def __init__(
        self, directory: Path, log_file: Path | None = None, *, plugins: Sequence[str] = ()
    ) -> None:
        self._directory = directory
        self.log_file = log_file or directory / "rabbitmq.log"
        self.password = secrets.token_urlsafe(24)
        self._plugins = tuple(plugins)
        self._choose_ports()
        self._was_ready = False
        self._node: SupervisedProcess | None = None

    @property
    def url(self) -> str:
        """The URL, without the password."""
        return f"amqp://keepwarm@127.0.0.1:{self.port}/"

    @property
    def alive(self) -> bool:
        return self._node is not None and self._node.exit_code() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Start it and wait until it listens. It is started a second time if its port mapper was
        not ready, or, with other ports, if another process has taken one of them before its first
        start. Raises BrokerError with the last lines of its log, or when `stopped` returns True.
        """
        try:
            self._start(stopped)
        except BrokerError as error:
            if stopped():
                raise
            if not self._was_ready and not all(map(_is_free, self._ports)):
                self._choose_ports()
            elif _NO_MAPPER not in str(error):
                raise
            self._start(stopped)
        self._was_ready = True

    def _choose_ports(self) -> None:
        self._ports = free_ports(3 + len(_LISTENING_PLUGINS))
        self.port, self._distribution_port, self._mapper_port, *others = self._ports
        self.plugin_ports = dict(zip(_LISTENING_PLUGINS, others, strict=True))

    def _start(self, stopped: Callable[[], bool]) -> None:
        self.stop()  # if it was started before and has ended, release its process
        server = find_server()
        self._write_configuration()
        with self.log_file.open("ab") as output:
            self._node = SupervisedProcess(
                [str(server)],
                environment=self._environment(server),
                grace_seconds=_STOP_SECONDS,
                output=output,
                directory=self._directory,
            )
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while not _listens(self.port):
            code = self._node.exit_code()
            if stopped():
                self.kill()
                raise BrokerError("stopped before the private RabbitMQ node was ready")
            if code is not None or time.monotonic() > deadline:
                self.stop()
                tail = "\n".join(self.log_file.read_text(errors="replace").splitlines()[-15:])
                raise BrokerError(
                    f"the private RabbitMQ node did not start (exit code {code}); its log, "
                    f"{self.log_file}, ends with:\n{tail}"
                )
            time.sleep(0.05)
        log.info("node.ready", port=self.port)

    def process(self) -> psutil.Process | None:
        """The node's own process; None if it is not running."""
        return None if self._node is None else self._node.command()

    def control(self, *command: str) -> str:
        """Run a `rabbitmqctl` command and return its output. Raises BrokerError if it fails."""
        server = find_server()
        done = subprocess.run(
            [str(server.parent / "rabbitmqctl"), "-q", *command],
            # If the node is down, it must not start a port mapper, which would stay (erl(1)).
            env={**self._environment(server), "ERL_ZFLAGS": "-start_epmd false"},
            cwd=self._directory,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_START_TIMEOUT_SECONDS,
        )
        if done.returncode:
            raise BrokerError(f"rabbitmqctl {command[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> None:
        """Shut it down cleanly: it can be started again with the messages in its queues."""
        if self._node is not None:
            self._node.stop()
            self._node = None

    def kill(self) -> None:
        """Kill it, when its messages are no longer needed."""
        if self._node is not None:
            self._node.kill()
            self._node = None

    def _write_configuration(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory.chmod(0o700)
        configuration = self._directory / "rabbitmq.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "default_user = keepwarm\n"
            f"default_pass = {self.password}\n"
            "log.console = true\n"
            "log.console.level = warning\n"
            "log.file = false\n"
            # The machine has other uses for its memory and disk. At these limits publishers are
            # blocked.
            "vm_memory_high_watermark.relative = 0.4\n"
            "disk_free_limit.absolute = 256MB\n" + self._plugin_listeners(),
            encoding="utf-8",
        )
        (self._directory / "advanced.config").write_text("[].\n", encoding="utf-8")
        (self._directory / "enabled_plugins").write_text(
            f"[{','.join(self._plugins)}].\n", encoding="utf-8"
        )

    def _plugin_listeners(self) -> str:
        return "".join(
            f"{settings}.tcp.ip = 127.0.0.1\n{settings}.tcp.port = {self.plugin_ports[plugin]}\n"
            for plugin, settings in _LISTENING_PLUGINS.items()
            if plugin in self._plugins
        )

    def _environment(self, server: Path) -> dict[str, str]:
        here = self._directory
        return {
            "PATH": f"{server.parent}:{os.environ.get('PATH', os.defpath)}",
            "LANG": "C.UTF-8",
            # The Erlang cookie is created here, not in the user's home.
            "HOME": str(here),
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"keepwarm-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(here / "data"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(here / "generated"),
            # A file that is not named here is read from /etc/rabbitmq, which is the system
            # broker's; its `conf.d` would override our own file
            # (https://www.rabbitmq.com/configure).
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(here / "conf.d" / "*.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(here / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(here / "pid"),
            # Makes the script exec the node, so that signals reach it.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput",
            # For the node, rabbitmqctl, and the short-lived node that starts the port mapper: each
            # of them listens for other nodes (erl(1)).
            "ERL_AFLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }


def find_server() -> Path:
    """The path of the installed server. Raises BrokerError if there is none."""
    for path in _SERVER_PATHS:
        if os.access(path, os.X_OK):
            return Path(path)
    found = shutil.which("rabbitmq-server")
    if found:
        return Path(found)
    raise BrokerError(
        "rabbitmq-server is not installed: run `apt-get install rabbitmq-server` as root, or use a "
        "running broker with --broker or KEEPWARM_BROKER_URL"
    )


def free_ports(count: int) -> list[int]:
    """Different ports that are free, below the kernel's ephemeral range: otherwise a connection or
    another command's metrics server could take one before we listen (ip(7)).
    """
    ephemeral_from = int(_EPHEMERAL_PORTS.read_text().split()[0])
    ports = range(_LOWEST_PORT, ephemeral_from if ephemeral_from > 2 * _LOWEST_PORT else 2**16)
    return list(islice(filter(_is_free, random.sample(ports, len(ports))), count))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
