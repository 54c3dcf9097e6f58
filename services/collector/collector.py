"""The collector: takes verdicts, commits them in batches, acknowledges after the commit."""

import threading
import time
from collections.abc import Callable
from itertools import count

import structlog

from services.broker import BrokerAddress, Consumer, Delivery
from services.collector.store import Incoming, Store
from services.contracts import (
    DeadClaim,
    RunAnnouncement,
    Settings,
    VerdictBatch,
    decode,
    topology,
)
from services.contracts.errors import MessageInvalid, StoreError

_PREFETCH = 512
# Half of the prefetch: the broker sends the other half while these are being committed.
_COMMIT_MESSAGES = _PREFETCH // 2
_TAKE_SECONDS = 0.1
_LULL_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 15.0

log = structlog.get_logger(__name__)


class Collector:
    """Moves what workers and producers say from the broker into the store.

    A message is acknowledged after the transaction that holds it is committed; when this process
    dies in between it comes again, and the store ignores and counts it.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._stop = threading.Event()
        self._finish = threading.Event()
        self.waiting_for: str | None = None
        """What keeps it from committing, in words, while something does."""

    def stop(self) -> None:
        """End after the next commit. Safe to call from a signal handler."""
        self._stop.set()

    def finish(self) -> None:
        """End once the broker has nothing more for the moment."""
        self._finish.set()

    def run(self, on_commit: Callable[[Incoming], None] = lambda _: None) -> None:
        """Collect until `stop` or `finish`. `on_commit` hears of every transaction once committed.

        Raises BrokerError when the broker cannot be used at the start. A store that fails later is
        waited for: nothing is acknowledged meanwhile, so nothing is lost.
        """
        with Consumer(
            BrokerAddress.from_settings(self._settings),
            "collector",
            queues=[topology.RUNS_QUEUE, topology.VERDICTS_QUEUE, topology.DEAD_CLAIMS_QUEUE],
            prefetch=_PREFETCH,
        ).open(self._settings.broker_connect_timeout_seconds) as consumer:
            while not self._stop.is_set():
                took = self._collect_once(consumer, on_commit)
                if self._finish.is_set() and not took:
                    break
            consumer.stop_taking(timeout_seconds=2.0)

    def _collect_once(self, consumer: Consumer, on_commit: Callable[[Incoming], None]) -> bool:
        """One transaction of what has come. False when nothing had."""
        incoming = Incoming()
        taken: list[Delivery] = []
        claims = 0
        deadline: float | None = None
        while (
            claims < self._settings.store_commit_verdicts
            and len(taken) < _COMMIT_MESSAGES
            and (deadline is None or time.monotonic() < deadline)
        ):
            # Under load the next message is there already; a lull is the moment to commit.
            delivery = consumer.take(_TAKE_SECONDS if deadline is None else _LULL_SECONDS)
            if delivery is None:
                break
            deadline = deadline or time.monotonic() + self._settings.store_commit_seconds
            try:
                claims += _add(incoming, delivery)
            except MessageInvalid as error:
                log.error("message.refused", queue=delivery.queue, reason=str(error))
                consumer.refuse([delivery])
            else:
                taken.append(delivery)
        if taken and self._write(incoming):
            consumer.acknowledge(taken)
            on_commit(incoming)
        return bool(taken)

    def _write(self, incoming: Incoming) -> bool:
        """Commit, however long it takes. False when told to stop before that was possible."""
        for failures in count():
            try:
                self._store.write(incoming)
                self.waiting_for = None
                return True
            except StoreError as error:
                pause = min(_LONGEST_PAUSE_SECONDS, 0.2 * 2 ** min(failures, 10))
                self.waiting_for = str(error)
                log.error("store.waiting", reason=str(error), again_in_seconds=pause)
                if self._finish.is_set() or self._stop.wait(pause):
                    break
        return False


def _add(incoming: Incoming, delivery: Delivery) -> int:
    """Decode a message into `incoming`; how many claims it has. Raises MessageInvalid."""
    if delivery.queue == topology.VERDICTS_QUEUE:
        batch = decode(VerdictBatch, delivery.body)
        incoming.verdicts.append(batch)
        return len(batch.verdicts)
    if delivery.queue == topology.RUNS_QUEUE:
        incoming.announcements.append(decode(RunAnnouncement, delivery.body))
        return 0
    incoming.dead.append(decode(DeadClaim, delivery.body))
    return 1
