"""The collector: takes messages, commits them in batches, acknowledges after the commit."""

import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import structlog
from prometheus_client import REGISTRY

from services.broker import BrokerAddress, Consumer, Declares, Delivery, Outgoing, Publisher
from services.collector.demand import DemandEstimator
from services.collector.discovery import targets
from services.collector.fleet import Fleet
from services.collector.gauges import Gauges, RunsSnapshot
from services.collector.metrics import (
    COMMIT_FAILURES,
    COMMIT_SECONDS,
    LAG_SECONDS,
    REFUSED,
    WAITING,
    count_commit,
)
from services.collector.missing_claims import MissingClaims
from services.collector.submissions import NotAnnounced, Submissions
from services.contracts import (
    ClaimBatch,
    ContextReady,
    ControlUpdate,
    DeadClaim,
    RunAnnouncement,
    Settings,
    VerdictBatch,
    WorkerHeartbeat,
    decode,
    topology,
)
from services.contracts.backoff import backoff_seconds
from services.contracts.clock import awake_seconds
from services.contracts.control import CONTROL_UPDATE_SECONDS
from services.contracts.errors import (
    BrokerUnreachable,
    KeepwarmError,
    MessageInvalid,
    MessageTooNew,
    StoreError,
    StoreRefused,
)
from services.contracts.heartbeats import unique_process_name
from services.contracts.wire import Message
from services.store.store import Incoming, Store
from services.telemetry import Watchdog

_KINDS: Mapping[str, type[Message]] = {
    topology.RUNS_QUEUE: RunAnnouncement,
    topology.VERDICTS_QUEUE: VerdictBatch,
    topology.DEAD_CLAIMS_QUEUE: DeadClaim,
    topology.RETURNS_QUEUE: ClaimBatch,
}
_PREFETCH = 512
# Returned batches are few and large, because they contain evidence.
_PREFETCH_OF = {topology.RETURNS_QUEUE: 32}
# Per queue. A message that is published again is in memory twice, and decoding takes several times
# its bytes: some 400 MiB in all, with the largest messages on all queues.
_MAX_BYTES = 32 * 1024 * 1024
_COMMIT_BYTES = _MAX_BYTES // 2
# Half of the prefetch: the broker delivers the other half during the commit.
_COMMIT_MESSAGES = _PREFETCH // 2
# It publishes messages that it holds unacknowledged, and one control update at a time. With this
# window, `publish` never waits for a blocked broker, so collecting goes on.
_WINDOW = _PREFETCH * len(_KINDS) + 1
_TAKE_SECONDS = 0.1
_LULL_SECONDS = 0.02
_ANNOUNCEMENT_SECONDS = 30.0
# At most this many messages wait for an announcement; more would take up the prefetch.
_MAX_UNANNOUNCED = _PREFETCH // 2
_FLUSH_SECONDS = 2.0
_READ_RUNS_SECONDS = 5.0
# At most a tenth of the time is spent reading the runs, even if the store is slow.
_PAUSES_PER_READ = 10.0
# The broker sends each control update to every worker: a large fleet gets them less often.
_CONTROL_UPDATE_BYTES_PER_SECOND = 2_000_000
# After a reconnect, the broker starts to redeliver within this time.
_REDELIVERY_SECONDS = 2.0
_FINISH_SECONDS = 20.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 15.0
# If the store refuses this many messages and accepts none of their kind, the store is at fault and
# not the messages. Fewer are kept for a while: the next message may show which of the two it is.
_MIN_REFUSED = 3
_KEEP_REFUSED_SECONDS = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ContextStatus:
    """Where a context's claims are, by the latest counts of the broker and the workers."""

    messages: int | None
    """Waiting in its queue; None if the queue does not exist or was not counted."""
    workers: int
    """That serve or load it."""
    claims_held: int
    """By its workers."""
    dead_messages: int
    """In `dead-messages`, of all contexts."""


class Collector:
    """Stores the messages of workers and producers, and publishes returned claims again.

    A message is acknowledged after its transaction is committed. If the process dies in between,
    the message is delivered again, and the store ignores and counts the duplicate.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._stop = threading.Event()
        self._finish = threading.Event()
        self._finish_by = math.inf
        self._control_update_due = 0.0
        self._last_update_had_content = False
        self._fleet = Fleet()
        self._demand = DemandEstimator(store, settings, self._fleet)
        self._runs = RunsSnapshot()
        self._runs_due = 0.0
        self._watchdog = Watchdog()
        self._links: tuple[Publisher, Consumer] | None = None
        self._submissions = Submissions(store)
        self._missing_claims = MissingClaims(store, self._demand, settings.broker_heartbeat_seconds)
        # Messages that came before their announcement, each with the time until which they wait
        # for it; and those of them that are to be checked again now.
        self._unannounced: deque[tuple[Delivery, float]] = deque()
        self._to_retry: deque[tuple[Delivery, float]] = deque()
        # Messages that the store has refused since it last accepted one of their kind.
        self._refused: list[tuple[Delivery, type[Message], StoreRefused]] = []
        self._refused_at = 0.0
        self._accepted: set[type[Message]] = set()
        self._refused_rounds = 0
        self._too_new: tuple[Delivery, MessageTooNew] | None = None
        self.waiting_for: str | None = None
        """The error that keeps it from committing; None if there is none."""
        WAITING.set_function(lambda: self.waiting_for is not None)

    # For other threads.

    @property
    def liveness_error(self) -> str | None:
        """See `metrics_server.Service`. Connecting at the start and stopping may take long, but
        both end, so neither counts as stalled.
        """
        waits = self._links is None or self._stop.is_set()
        return None if waits else self._watchdog.liveness_error

    @property
    def readiness_error(self) -> str | None:
        if self._links is None:
            return "no connection to the broker"
        return self.broker_error or self.waiting_for

    @property
    def broker_error(self) -> str | None:
        """Why the broker cannot be used now; None also until it was connected to."""
        errors = (link.readiness_error for link in self._links or ())
        return next(filter(None, errors), None)

    def worker(self, worker_id: str) -> WorkerHeartbeat | None:
        """The latest heartbeat of this worker, if it is live."""
        return self._fleet.worker(worker_id)

    def targets(self) -> list[dict[str, Any]]:
        """The live workers' metrics addresses, for Prometheus."""
        return targets(self._fleet.workers(), socket.gethostname())

    def context_status(self, context_id: str | None) -> ContextStatus:
        counts = self._demand.counts
        on_it = [each for each in self._fleet.workers() if each.context_id == context_id]
        return ContextStatus(
            messages=counts.get(topology.claims_queue(context_id)) if context_id else None,
            workers=len(on_it) if context_id else 0,
            claims_held=self._fleet.claims_held()[context_id] if context_id else 0,
            dead_messages=counts.get(topology.DEAD_MESSAGES_QUEUE, 0),
        )

    def stop(self) -> None:
        """End after the next commit."""
        self._stop.set()

    def finish(self) -> None:
        """End once the broker has no more messages for now. If the connection is lost, it waits up
        to 20 s for a new one.
        """
        self._finish_by = awake_seconds() + _FINISH_SECONDS
        self._finish.set()

    def run(
        self,
        on_commit: Callable[[Incoming], None] = lambda _: None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Collect until `stop`, `finish`, or until `until` returns True; it is called after each
        commit and every two seconds. `on_commit` is called with each committed transaction.

        Raises BrokerError if the broker cannot be used at the start; MessageTooNew after storing
        what it has and requeuing that message. If the store fails later, the collector retries:
        nothing is acknowledged meanwhile, so nothing is lost.
        """
        try:
            self._run(on_commit, until)
        except BrokerUnreachable:
            if not self._stop.is_set():  # otherwise it was stopped before it was connected
                raise

    # The main loop.

    def _run(self, on_commit: Callable[[Incoming], None], until: Callable[[], bool]) -> None:
        address = BrokerAddress.from_settings(self._settings)
        timeout = self._settings.broker_connect_timeout_seconds
        declares = Declares("always")
        with (
            Publisher(address, "collector-claims", window=_WINDOW, declares=declares).open(
                timeout, self._stop.is_set
            ) as publisher,
            Consumer(
                address,
                "collector",
                queues=tuple(_KINDS),
                prefetch=_PREFETCH,
                prefetch_of=_PREFETCH_OF,
                max_bytes=_MAX_BYTES,
                declares=declares,
                on_fanout_message=self._on_heartbeat,
                listener=unique_process_name(),
                fanout_exchange=topology.HEARTBEATS_EXCHANGE,
            ).open(timeout, self._stop.is_set) as consumer,
            self._serving_metrics(publisher, consumer),
        ):
            disconnected_at = -math.inf
            while not self._stop.is_set():
                self._watchdog.beat()
                publisher.raise_if_dead()
                if not consumer.consuming:
                    self._fleet.note_disconnected()
                    disconnected_at = awake_seconds()
                collected = self._collect_once(consumer, publisher, on_commit)
                self._read_runs()
                done = self._finish.is_set() and not collected and self._has_all(disconnected_at)
                if self._too_new is not None or done:
                    break
                updated = self._send_control_update(publisher)
                if updated:
                    # On the consumer's connection, which an alarm of the broker does not block.
                    self._demand.request_counts(consumer, topology.CORE_QUEUES)
                    self._retry_unannounced()
                if (updated or collected) and _is_satisfied(until):
                    break
            consumer.stop_taking(timeout_seconds=2.0)
            try:
                publisher.flush(_FLUSH_SECONDS)
                # The reason to end may be a cancelled run, which workers must be told.
                self._control_update_due = 0.0
                self._send_control_update(publisher)
                publisher.flush(_FLUSH_SECONDS)
            except BrokerUnreachable as error:
                log.warning("claims.unconfirmed", reason=str(error))  # they are delivered again
            if self._too_new is not None:
                delivery, too_new = self._too_new
                consumer.give_back([delivery])
                log.error("message.newer", queue=delivery.queue, reason=str(too_new))
                raise too_new

    @contextmanager
    def _serving_metrics(self, publisher: Publisher, consumer: Consumer) -> Iterator[None]:
        self._watchdog.beat()
        self._links = publisher, consumer
        self._read_runs()
        gauges = Gauges(self._fleet, self._demand, lambda: self._runs)
        REGISTRY.register(gauges)
        try:
            yield
        finally:
            REGISTRY.unregister(gauges)
            self._links = None

    def _on_heartbeat(self, body: bytes) -> None:
        """Called on the link's thread."""
        try:
            self._fleet.note(decode(WorkerHeartbeat, body))
        except (MessageInvalid, MessageTooNew) as error:
            log.warning("heartbeat.refused", reason=str(error))

    def _has_all(self, disconnected_at: float) -> bool:
        """During a lull: whether nothing is left, or the time to wait for more is over."""
        now = awake_seconds()
        return now - disconnected_at > _REDELIVERY_SECONDS or now > self._finish_by

    def _collect_once(
        self, consumer: Consumer, publisher: Publisher, on_commit: Callable[[Incoming], None]
    ) -> bool:
        """Commit one transaction of the messages that have arrived. False if there were none."""
        taken: list[tuple[Delivery, Message]] = []
        deadline: float | None = None
        outcomes = size = 0
        while (
            outcomes < self._settings.store_commit_verdicts
            and len(taken) < _COMMIT_MESSAGES
            and size < _COMMIT_BYTES
            and (deadline is None or time.monotonic() < deadline)
        ):
            # Under load the next message has arrived already; in a lull it is time to commit.
            announced_by: float | None = None
            if self._to_retry:
                delivery, announced_by = self._to_retry.popleft()
            else:
                found = consumer.take(_TAKE_SECONDS if deadline is None else _LULL_SECONDS)
                if found is None:
                    break
                delivery = found
            deadline = deadline or time.monotonic() + self._settings.store_commit_seconds
            size += len(delivery.body)
            try:
                message = self._submissions.checked(delivery.message(_kind(delivery)))
            except MessageTooNew as error:
                self._too_new = delivery, error
                break
            except NotAnnounced as error:
                self._defer(delivery, announced_by, error, consumer, publisher)
            except StoreError as error:
                log.error("store.waiting", reason=str(error))
                self._unannounced.append((delivery, time.monotonic() + _ANNOUNCEMENT_SECONDS))
                self._stop.wait(_FIRST_PAUSE_SECONDS)
                break
            except MessageInvalid as error:
                _refuse(delivery, error, consumer, publisher)
            else:
                outcomes += _outcomes(message)
                taken.append((delivery, message))
        self._accepted.clear()
        if taken:
            self._commit(taken, consumer, publisher, on_commit)
        if self._refused:
            self._settle_refused(consumer, publisher)
        return bool(taken)

    def _defer(
        self,
        delivery: Delivery,
        announced_by: float | None,
        error: NotAnnounced,
        consumer: Consumer,
        publisher: Publisher,
    ) -> None:
        """Keep a message until its announcement has come; refuse it after a while."""
        now = time.monotonic()
        announced_by = announced_by or now + _ANNOUNCEMENT_SECONDS
        if now >= announced_by or len(self._unannounced) >= _MAX_UNANNOUNCED:
            _refuse(delivery, error, consumer, publisher)
        else:
            self._unannounced.append((delivery, announced_by))

    def _retry_unannounced(self) -> None:
        self._to_retry.extend(self._unannounced)
        self._unannounced.clear()

    def _commit(
        self,
        taken: Sequence[tuple[Delivery, Message]],
        consumer: Consumer,
        publisher: Publisher,
        on_commit: Callable[[Incoming], None],
    ) -> None:
        """Commit the messages in one transaction, then acknowledge them and publish returned claims
        again. If the store refuses a value, the message with that value is found by halving, and
        all others are committed.
        """
        incoming = Incoming.of(message for _, message in taken)
        try:
            if not self._write(incoming):
                return
        except StoreRefused as error:
            if len(taken) == 1:
                ((delivery, message),) = taken
                self._refused_at = self._refused_at if self._refused else awake_seconds()
                self._refused.append((delivery, type(message), error))
                return
            middle = len(taken) // 2
            for half in (taken[:middle], taken[middle:]):
                self._commit(half, consumer, publisher, on_commit)
            return
        consumer.acknowledge(
            delivery for delivery, each in taken if not isinstance(each, ClaimBatch)
        )
        self._accepted.update(type(message) for _, message in taken)
        committed = time.monotonic()
        for delivery, _ in taken:
            LAG_SECONDS.observe(committed - delivery.received_at)
        on_commit(incoming)
        for delivery, message in taken:
            if not isinstance(message, ClaimBatch):
                continue
            try:
                republish_wanted(message, delivery, self._store, consumer, publisher)
            except (MessageInvalid, StoreRefused) as error:
                _refuse(delivery, error, consumer, publisher)
            except StoreError as error:
                log.error("store.waiting", reason=str(error))
                consumer.give_back([delivery])

    def _settle_refused(self, consumer: Consumer, publisher: Publisher) -> None:
        """Move refused messages to `dead-messages`, once the store has accepted another of their
        kind. If it accepts none, wait for the store and try them again.
        """
        few = len(self._refused) < _MIN_REFUSED
        expired = few and awake_seconds() - self._refused_at >= _KEEP_REFUSED_SECONDS
        kept: list[tuple[Delivery, type[Message], StoreRefused]] = []
        for delivery, kind, error in self._refused:
            if expired or kind in self._accepted:
                _refuse(delivery, error, consumer, publisher)
            else:
                kept.append((delivery, kind, error))
        self._refused = kept
        if len(kept) < _MIN_REFUSED:
            self._refused_rounds, self.waiting_for = 0, None
            return
        self._refused_rounds += 1
        self.waiting_for = (
            f"{len(kept)} messages in a row were refused, the first because {kept[0][2]}"
        )
        if not self._pause(self._refused_rounds):
            retried_until = time.monotonic() + _ANNOUNCEMENT_SECONDS
            self._to_retry.extend((delivery, retried_until) for delivery, _, _ in kept)
        self._refused = []  # if told to end, the broker delivers them again

    def _pause(self, failures: int) -> bool:
        """Wait, after a commit failed because of `waiting_for`. True if told to end meanwhile."""
        COMMIT_FAILURES.inc()
        pause = backoff_seconds(
            failures, first_seconds=_FIRST_PAUSE_SECONDS, longest_seconds=_LONGEST_PAUSE_SECONDS
        )
        log.error("store.waiting", reason=self.waiting_for, again_in_seconds=round(pause, 1))
        return self._finish.is_set() or self._stop.wait(pause)

    def _write(self, incoming: Incoming) -> bool:
        """Commit, retrying until it succeeds. False if stopped before that.

        Raises StoreRefused if the store refuses a value, which a retry cannot change.
        """
        for failures in count(1):
            self._watchdog.beat()
            try:
                with COMMIT_SECONDS.time():
                    fresh = self._store.write(incoming)
            except StoreRefused:
                raise
            except StoreError as error:
                self.waiting_for = str(error)
                if self._pause(failures):
                    break
            else:
                self.waiting_for = None
                self._missing_claims.note(incoming.run_ids())
                count_commit(incoming, fresh)
                return True
        return False

    def _read_runs(self) -> None:
        """Read the statuses of runs for the gauges, from time to time."""
        began = time.monotonic()
        if began < self._runs_due:
            return
        with suppress(StoreError):  # the next commit logs it
            self._runs = RunsSnapshot.read(self._store)
        ended = time.monotonic()
        self._runs_due = ended + max(_READ_RUNS_SECONDS, _PAUSES_PER_READ * (ended - began))

    def _send_control_update(self, publisher: Publisher) -> bool:
        """Tell every worker, from time to time, which submissions are cancelled and which contexts
        have claims waiting. False if it is not due.
        """
        now = time.monotonic()
        if now < self._control_update_due or publisher.pending:
            return False
        self._control_update_due = now + CONTROL_UPDATE_SECONDS
        try:
            contexts = self._demand.update()
            cancelled = self._store.cancelled_submissions(self._demand.settled_runs())
            self._missing_claims.check()
        except StoreError:
            return False  # the next commit logs the error
        update = ControlUpdate(cancelled=cancelled, contexts=contexts)
        has_content = bool(update.cancelled or update.contexts)
        # After the last update with content an empty one is sent, which replaces it.
        if has_content or self._last_update_had_content:
            message = Outgoing.of(update, topology.CONTROL_EXCHANGE, "")
            publisher.publish(message)
            sent_bytes = len(message.body) * len(self._fleet.workers())
            self._control_update_due = now + max(
                CONTROL_UPDATE_SECONDS, sent_bytes / _CONTROL_UPDATE_BYTES_PER_SECOND
            )
        self._last_update_had_content = has_content
        return True


def republish_wanted(
    batch: ClaimBatch,
    delivery: Delivery,
    store: Store,
    consumer: Consumer,
    publisher: Publisher,
) -> None:
    """Publish those claims of a returned batch that are still wanted, and acknowledge the delivery
    once the broker has confirmed them. `Submissions.checked` must have accepted the batch.

    Raises MessageInvalid; StoreError if the store cannot be read.
    """
    run_id = batch.run.run_id
    wanted: list[int] = []
    if store.is_active(batch.submission_id):
        done = store.finished(run_id, [claim.claim_id for claim in batch.claims])
        indices = {claim.claim_id: index for index, claim in enumerate(batch.claims)}
        wanted = [index for claim_id, index in indices.items() if claim_id not in done]
    log.info("claims.returned", run=run_id, claims=len(batch.claims), republished=len(wanted))
    if not wanted:
        consumer.acknowledge([delivery])
        return
    context_id = batch.run.context.context_id
    publisher.also_declare(context_id)
    publisher.publish(
        Outgoing.of(
            batch.only(wanted),
            topology.CLAIMS_EXCHANGE,
            topology.claims_queue(context_id),
            message_id=delivery.message_id,
            headers=delivery.history,
            on_confirmed=lambda: consumer.acknowledge([delivery]),
        )
    )


def _refuse(
    delivery: Delivery, error: KeepwarmError, consumer: Consumer, publisher: Publisher
) -> None:
    """Move a message to `dead-messages`."""
    REFUSED.inc()
    log.error("message.refused", queue=delivery.queue, reason=str(error))
    publisher.publish(
        delivery.as_dead_message(str(error), lambda: consumer.acknowledge([delivery]))
    )


def _kind(delivery: Delivery) -> type[Message]:
    """The type of a message, by its queue; the verdicts queue also has `ContextReady`."""
    if delivery.queue == topology.VERDICTS_QUEUE and delivery.kind == ContextReady.wire_type:
        return ContextReady
    return _KINDS[delivery.queue]


def _outcomes(message: Message) -> int:
    if isinstance(message, VerdictBatch):
        return len(message.verdicts)
    return int(isinstance(message, DeadClaim))


def _is_satisfied(until: Callable[[], bool]) -> bool:
    try:
        return until()
    except StoreError:
        return False  # it is called again later
