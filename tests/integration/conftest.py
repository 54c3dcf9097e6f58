"""A real RabbitMQ node, and the real commands as processes, with the tests' engine behind them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pika
import psutil
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from services.broker import BrokerAddress, Declares, PrivateNode, Publisher
from services.broker.link import Link
from services.contracts import ContextSpec, Settings, load_settings, topology
from services.models.files import pin_model
from tests.conftest import REPOSITORY
from tests.integration.postgres import PostgreSQL

# Seconds for whatever must come: they are lost only where a test fails. pytest waits longer.
PATIENCE = 240.0
# RabbitMQ 3.10.8 loses a quorum queue when its node is killed within seconds of its creation.
_YOUNG_QUEUE_SECONDS = 7.0
_QUICKER = str(REPOSITORY / "tests" / "doubles" / "quicker_keepwarm.py")


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE):
    """Poll until `condition` is true; what it returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"after {seconds:g} s still not: {what}")


class Command:
    """A `keepwarm` command as a process of its own, its output at hand."""

    program = ("-m", "services.cli.main")

    def __init__(
        self, environment: dict[str, str], *arguments: str, python: str | Path = sys.executable
    ) -> None:
        program = (_QUICKER,) if "TEST_WAITS" in environment else self.program
        self.process = subprocess.Popen(
            [python, *program, *arguments],
            env={**environment, "PYTHONFAULTHANDLER": "1"},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._records = Path(environment.get("KEEPWARM_RUNTIME_DIR", ""), "workers")
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def said(self, text: str, times: int = 1) -> None:
        def has_said() -> bool:
            if self.process.poll() is not None:
                self._reader.join(10)  # with all that it said
                assert self.output.count(text) >= times, self.output
            return self.output.count(text) >= times

        wait_until(has_said, f"{text!r} in the output")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code. One that does not end tells where each of its threads is."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)
            self.process.wait(10)
            self._reader.join(10)
            # A worker has its threads written to its record of crashes, others to their output.
            left = "\n".join(path.read_text() for path in self._records.glob("*/fatal.log"))
            raise AssertionError(f"alive after {seconds:g} s:\n{self.output}\n{left}") from None
        self._reader.join(10)
        return code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def descendant(self, is_it: Callable[[list[str]], bool]) -> psutil.Process:
        """The one with such a command line, among others that may end meanwhile."""
        for process in self.descendants():
            with suppress(psutil.Error):
                if is_it(process.cmdline()):
                    return process
        raise AssertionError(f"it has no such descendant: {self.output}")

    def end(self) -> None:
        if self.process.poll() is None:
            left = self.descendants()
            self.process.kill()
            self.process.wait(10)
            for process in left:
                with suppress(psutil.NoSuchProcess):  # most go by themselves just now
                    process.kill()
        self._reader.join(10)


def is_worker(command_line: list[str]) -> bool:
    return command_line[5:7] == ["services.cli.main", "worker"]


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNode]:
    with PrivateNode(tmp_path_factory.mktemp("broker") / "node") as running:
        yield running


@pytest.fixture
def broker(node: PrivateNode, small_model: Path) -> Iterator[Settings]:
    """Settings for the node, whose queues are empty."""
    context = pin_model(ContextSpec(model=str(small_model))).context_id
    settings = load_settings(
        broker_url=node.url, broker_password=node.password, broker_heartbeat_seconds=5
    )
    claims = (topology.claims_queue(context), topology.claims_queue("ctx-test"))
    delete_queues(node, *topology.CORE_QUEUES, *claims)
    Publisher(
        BrokerAddress.from_settings(settings),
        "house",
        window=1,
        declares=Declares("always", (context,)),
    ).open(PATIENCE).close()
    yield settings


def let_queues_age(made: float) -> None:
    """Wait until queues that were made then are old enough to outlive their node's violent end."""
    time.sleep(max(0.0, made + _YOUNG_QUEUE_SECONDS - time.monotonic()))


def ended(node: PrivateNode) -> None:
    """Wait for a node's end, and let go of what is left of it."""
    wait_until(lambda: not node.alive, "the node's end")
    node.stop()


def plain_connection(node: PrivateNode) -> pika.BlockingConnection:
    """A connection that does not go through the code under test."""
    return pika.BlockingConnection(
        pika.ConnectionParameters(
            "127.0.0.1", node.port, credentials=pika.PlainCredentials("keepwarm", node.password)
        )
    )


def send(
    node: PrivateNode,
    exchange: str,
    queue: str,
    *bodies: bytes,
    how: pika.BasicProperties | None = None,
) -> None:
    """Messages from a stranger. Confirmed ones, or their connection's end may take them along."""
    connection = plain_connection(node)
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish(exchange, queue, body, how, mandatory=True)
    finally:
        connection.close()


def delete_queues(node: PrivateNode, *names: str) -> None:
    connection = plain_connection(node)
    channel = connection.channel()
    for name in names:
        channel.queue_delete(name)
    connection.close()


def cut(link: Link) -> None:
    """End a link's TCP connection under it, as a failed switch would."""
    link._connection._transport._sock.shutdown(socket.SHUT_RDWR)


def wait_for_messages(node: PrivateNode, queue: str, count: int, what: str) -> None:
    """Wait until as many wait in a queue, unacknowledged ones not counted."""
    seen = -1
    with plain_connection(node) as connection:
        channel = connection.channel()

        def as_many() -> bool:
            nonlocal seen
            seen = _waiting(channel, queue)
            return seen == count

        try:
            wait_until(as_many, what)
        except AssertionError as late:
            raise AssertionError(f"{late}: {seen} in {queue}, not {count}") from None


def messages_in(node: PrivateNode, queue: str) -> int:
    """How many messages wait in a queue, unacknowledged ones not counted."""
    with plain_connection(node) as connection:
        return _waiting(connection.channel(), queue)


def _waiting(channel: BlockingChannel, queue: str) -> int:
    return channel.queue_declare(queue, passive=True).method.message_count


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    """A server of the tests' own."""
    try:
        server = PostgreSQL()
    except FileNotFoundError:
        pytest.skip("PostgreSQL's server is not installed; `setup/system.sh --with-tests` does")
    with server as running:
        yield running


@pytest.fixture
def address(broker: Settings) -> BrokerAddress:
    return BrokerAddress.from_settings(broker)


def clean_environment() -> dict[str, str]:
    """The machine's own, without settings of ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith("KEEPWARM_")}


@pytest.fixture
def environment(
    node: PrivateNode,
    broker: Settings,
    small_model: Path,
    doubles_python: Path,
    tmp_path: Path,
    runtime_dir: Path,
) -> dict[str, str]:
    """What a command needs to find the node, the small model and the tests' engine."""
    return {
        **clean_environment(),
        "KEEPWARM_ENGINE_PYTHON": str(doubles_python),
        "KEEPWARM_BROKER_URL": node.url,
        "KEEPWARM_BROKER_PASSWORD": node.password,
        "KEEPWARM_STORE_URL": str(tmp_path / "store.sqlite"),
        "KEEPWARM_MODEL": str(small_model),
        "KEEPWARM_RUNTIME_DIR": str(runtime_dir),
        "KEEPWARM_CACHE_DIR": str(runtime_dir.parent / "cache"),
        "KEEPWARM_GRACE_SECONDS": "6",
        "KEEPWARM_BATCHES_IN_FLIGHT": "3",
        "KEEPWARM_LOG_FORMAT": "json",
        "VLLM_TEST_HURRY": str(tmp_path / "hurry"),
    }


@contextmanager
def commands(environment: dict[str, str]) -> Iterator[Callable[..., Command]]:
    """Start commands; whatever happens, they and all they started are gone at the end."""
    started: list[Command] = []

    def start(*arguments: str, python: str | Path = sys.executable, **variables: str) -> Command:
        running = Command({**environment, **variables}, *arguments, python=python)
        started.append(running)
        return running

    try:
        yield start
    finally:
        for running in started:
            running.end()


@pytest.fixture
def command(environment: dict[str, str]) -> Iterator[Callable[..., Command]]:
    with commands(environment) as start:
        yield start
