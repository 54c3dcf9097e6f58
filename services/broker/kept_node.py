"""A private node that outlives a run: lent to one run at a time, and kept for the next for a while.

To start one takes seconds, which is most of the time of a small run on a warm engine.
"""

import shutil
import threading
from pathlib import Path

import pika
import structlog
from pika.exceptions import AMQPError

from services.broker.private_node import PrivateNode
from services.contracts import topology
from services.contracts.clock import awake
from services.contracts.errors import BrokerError

_ANSWER_SECONDS = 5.0

log = structlog.get_logger(__name__)


class KeptNode:
    """Any thread may call its methods."""

    def __init__(self, directory: Path, log_file: Path, idle_seconds: float) -> None:
        """Its data is in `directory`, which is removed with it. `idle_seconds` is how long it stays
        that nobody uses.
        """
        self._directory = directory
        self._log_file = log_file
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._node: PrivateNode | None = None
        self._lent = self._closed = False
        self._used_at = 0.0

    @property
    def there(self) -> bool:
        """Whether it is lent, or waits for the next run."""
        return self._lent or self._node is not None

    def lend(self) -> PrivateNode | None:
        """The node, started where there is none; None while another run has it, and at the end.

        Raises BrokerError when it cannot be started.
        """
        if self._lent:
            return None  # at once: its start, on behalf of whoever has it, takes seconds
        with self._lock:
            if self._lent or self._closed:
                return None
            self._lent = True
            try:
                if self._node is None or not self._node.alive:
                    self._discard()
                    self._node = PrivateNode(self._directory, self._log_file)
                    self._node.start()
            except BaseException:
                self._discard()
                self._lent = False
                raise
            return self._node

    def look_after(self) -> None:
        """Start the node again where it was killed while it is lent: its queues are on its disk."""
        with self._lock:
            if self._lent and self._node is not None and not self._node.alive:
                try:
                    self._node.start()
                except BrokerError as error:  # tried again at the next look
                    log.error("node.not_started", reason=str(error))

    def take_back(self, claims_queue: str | None) -> None:
        """Whoever had it is done with it, and says that nothing is left in its queues: those that
        every run has, and this one; None where it was not used. It stays for the next, if so it is.
        """
        with self._lock:
            self._lent = False
            self._used_at = awake()
            node = self._node
            if node is None or claims_queue is None or _is_empty(node, claims_queue):
                return
            self._discard()

    def throw_away(self) -> None:
        """Whoever had it is gone: the next run would find what is not its own."""
        with self._lock:
            self._lent = False
            self._discard()

    def end_if_idle(self) -> None:
        """Stop it when nobody has used it for so long. Never waits for whoever is at it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            idle_seconds = awake() - self._used_at
            if self._node is not None and not self._lent and idle_seconds > self._idle_seconds:
                self._discard()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Stop it, whoever uses it."""
        with self._lock:
            self._closed = True
            self._discard()

    def _discard(self) -> None:
        if self._node is not None:
            self._node.kill()
            self._node = None
        shutil.rmtree(self._directory, ignore_errors=True)


def _is_empty(node: PrivateNode, claims_queue: str) -> bool:
    """Whether no message is left in the queues of a run, and nobody reads them."""
    parameters = pika.ConnectionParameters(
        host="127.0.0.1",
        port=node.port,
        credentials=pika.PlainCredentials("keepwarm", node.password),
        blocked_connection_timeout=_ANSWER_SECONDS,
        socket_timeout=_ANSWER_SECONDS,
    )
    try:
        with pika.BlockingConnection(parameters) as connection:
            channel = connection.channel()
            for queue in (*topology.CORE_QUEUES, claims_queue):
                found = channel.queue_declare(queue, passive=True).method
                if found.message_count or found.consumer_count:
                    log.info("node.not_empty", queue=queue, messages=found.message_count)
                    return False
    except AMQPError as error:
        log.info("node.not_asked", reason=repr(error))
        return False
    return True
