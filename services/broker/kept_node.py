"""A private node that outlives a run: one run at a time uses it, then it is kept for the next.

Starting a node takes seconds, which is most of the time of a small run on a warm engine.
"""

import shutil
import threading
from pathlib import Path

import pika
import structlog
from pika.exceptions import AMQPError

from services.broker.private_node import PrivateNode
from services.contracts import topology
from services.contracts.clock import awake_seconds
from services.contracts.errors import BrokerError

_ANSWER_SECONDS = 5.0

log = structlog.get_logger(__name__)


class KeptNode:
    """Any thread may call its methods."""

    def __init__(self, directory: Path, log_file: Path, idle_seconds: float) -> None:
        """Its data is in `directory`, which is removed with it. An unused node is stopped after
        `idle_seconds`.
        """
        self._directory = directory
        self._log_file = log_file
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._node: PrivateNode | None = None
        self._in_use = self._closed = False
        self._used_at = 0.0

    @property
    def exists(self) -> bool:
        """Whether a run uses it, or it waits for the next run."""
        return self._in_use or self._node is not None

    def acquire(self) -> PrivateNode | None:
        """The node, started if necessary; None while another run uses it, and after `close`.

        Raises BrokerError if it cannot be started.
        """
        if self._in_use:
            return None  # without the lock, which is held for seconds while the node starts
        with self._lock:
            if self._in_use or self._closed:
                return None
            self._in_use = True
            try:
                if self._node is None or not self._node.alive:
                    self._discard()
                    self._node = PrivateNode(self._directory, self._log_file)
                    self._node.start(self._is_closed)
            except BaseException:
                self._discard()
                self._in_use = False
                raise
            return self._node

    def restart_if_down(self) -> None:
        """Start the node again if it was killed while in use: its queues are on its disk."""
        with self._lock:
            if self._in_use and self._node is not None and not self._node.alive:
                try:
                    self._node.start(self._is_closed)
                except BrokerError as error:  # tried again at the next call
                    log.error("node.not_started", reason=str(error))

    def release(self, claims_queue: str | None) -> None:
        """Return the node. It is kept for the next run if the core queues and `claims_queue` are
        empty, or if the run did not use it (`claims_queue` None). Otherwise it is discarded.
        """
        with self._lock:
            self._in_use = False
            self._used_at = awake_seconds()
            node = self._node
            if node is None or claims_queue is None or _is_empty(node, claims_queue):
                return
            self._discard()

    def discard(self) -> None:
        """Stop the node because its run ended without `release`: its queues may not be empty."""
        with self._lock:
            self._in_use = False
            self._discard()

    def end_if_idle(self) -> None:
        """Stop it if it has been unused for `idle_seconds`. Never waits for the lock."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            idle_seconds = awake_seconds() - self._used_at
            if self._node is not None and not self._in_use and idle_seconds > self._idle_seconds:
                self._discard()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Stop it, even while it is in use or starts."""
        self._closed = True  # ends a start, which holds the lock
        with self._lock:
            self._discard()

    def _is_closed(self) -> bool:
        return self._closed

    def _discard(self) -> None:
        if self._node is not None:
            self._node.kill()
            self._node = None
        shutil.rmtree(self._directory, ignore_errors=True)


def _is_empty(node: PrivateNode, claims_queue: str) -> bool:
    """Whether the queues of a run have no messages and no consumers."""
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
