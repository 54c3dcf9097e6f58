"""The collector: takes verdicts, commits them in batches, acknowledges after the commit."""

import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import structlog
from prometheus_client import REGISTRY

from services.broker import BrokerAddress, Consumer, Declares, Delivery, Outgoing, Publisher
from services.collector.demand import DemandEstimator
from services.collector.discovery import targets
from services.collector.fleet import Fleet
from services.collector.gauges import Gauges
from services.collector.metrics import (
    COMMIT_FAILURES,
    COMMIT_SECONDS,
    LAG_SECONDS,
    REFUSED,
    WAITING,
    count_in,
)
from services.collector.nowhere import Nowhere
from services.collector.run_counts import RunCounts
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
from services.contracts.backoff import growing_pause
from services.contracts.clock import awake
from services.contracts.control import CONTROL_UPDATE_SECONDS
from services.contracts.errors import (
    BrokerUnreachable,
    KeepwarmError,
    MessageInvalid,
    MessageTooNew,
    StoreError,
    StoreRefused,
)
from services.contracts.heartbeats import own_name
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
# Returned batches hold evidence, so they are large, and there are few.
_PREFETCH_OF = {topology.RETURNS_QUEUE: 32}
# Of each queue. Unsettled messages are held twice while they are sent on, and decoded a part of
# them takes several times its bytes: some 400 MiB in all, with the largest messages on all queues.
_MOST_BYTES = 32 * 1024 * 1024
_COMMIT_BYTES = _MOST_BYTES // 2
# Half of the prefetch: the broker sends the other half while these are being committed.
_COMMIT_MESSAGES = _PREFETCH // 2
# What it publishes are messages that it holds unacknowledged, and one notice at a time: with this
# window it never waits for a broker that takes nothing for the moment, and goes on collecting.
_WINDOW = _PREFETCH * len(_KINDS) + 1
_TAKE_SECONDS = 0.1
_LULL_SECONDS = 0.02
_ANNOUNCEMENT_SECONDS = 30.0
# So many wait for an announcement; with more of them there would be no room for what can be used.
_MOST_EARLY = _PREFETCH // 2
_FLUSH_SECONDS = 2.0
# The broker sends each notice to every worker: to a large fleet they go less often.
_NOTICE_BYTES_PER_SECOND = 2_000_000
# What comes after a connection was lost begins within moments of the new one.
_SETTLED_SECONDS = 2.0
_FINISH_SECONDS = 20.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 15.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a context's claims are, as broker and workers last said."""

    messages: int | None
    """That wait in its queue; None where there is none, or the broker was not asked for it."""
    workers: int
    """That serve it or load it."""
    claims_held: int
    """By its workers."""
    dead_messages: int
    """In `dead-messages`, of all contexts."""


class Collector:
    """Moves what workers and producers say from the broker into the store, and puts the claims that
    workers give back onto their queue again.

    A message is acknowledged after the transaction that holds it is committed; when this process
    dies in between it comes again, and the store ignores and counts it.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._stop = threading.Event()
        self._finish = threading.Event()
        self._finish_by = math.inf
        self._notice_due = 0.0
        self._noticed = False
        self._fleet = Fleet()
        self._directory = DemandEstimator(store, settings, self._fleet)
        self._run_counts = RunCounts(store)
        self._pulse = Watchdog()
        self._links: tuple[Publisher, Consumer] | None = None
        self._submissions = Submissions(store)
        self._nowhere = Nowhere(store, self._directory, settings.broker_heartbeat_seconds)
        # Those that came before their announcement, each with the time until which we wait for it,
        # and those of them whose turn it is again.
        self._early: deque[tuple[Delivery, float]] = deque()
        self._again: deque[tuple[Delivery, float]] = deque()
        self._newer: tuple[Delivery, MessageTooNew] | None = None
        self.waiting_for: str | None = None
        """What keeps it from committing, in words, while something does."""
        WAITING.set_function(lambda: self.waiting_for is not None)

    @property
    def liveness_error(self) -> str | None:
        """See `telemetry.server.Service`. To wait for a broker at the start, and to end, may take
        long, and ends.
        """
        waits = self._links is None or self._stop.is_set()
        return None if waits else self._pulse.liveness_error

    @property
    def readiness_error(self) -> str | None:
        if self._links is None:
            return "no connection to the broker"
        faults = (link.readiness_error for link in self._links)
        return next(filter(None, faults), None) or self.waiting_for

    def targets(self) -> list[dict[str, Any]]:
        """Where Prometheus finds the workers that are there."""
        return targets(self._fleet.workers(), socket.gethostname())

    def whereabouts(self, context_id: str | None) -> Whereabouts:
        counts = self._directory.counts
        on_it = [each for each in self._fleet.workers() if each.context_id == context_id]
        return Whereabouts(
            messages=counts.get(topology.claims_queue(context_id)) if context_id else None,
            workers=len(on_it) if context_id else 0,
            claims_held=self._fleet.claims_held()[context_id] if context_id else 0,
            dead_messages=counts.get(topology.DEAD_MESSAGES_QUEUE, 0),
        )

    def stop(self) -> None:
        """End after the next commit. Any thread may call it."""
        self._stop.set()

    def finish(self) -> None:
        """End once the broker has nothing more for the moment. A connection that was lost is waited
        for, 20 s at most.
        """
        self._finish_by = awake() + _FINISH_SECONDS
        self._finish.set()

    def run(
        self,
        on_commit: Callable[[Incoming], None] = lambda _: None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Collect until `stop`, `finish`, or `until` says so, which is asked after each commit and
        every two seconds. `on_commit` hears of every transaction once committed.

        Raises BrokerError when the broker cannot be used at the start; MessageTooNew, once what it
        has is stored and that message given back. A store that fails later is waited for: nothing
        is acknowledged meanwhile, so nothing is lost.
        """
        try:
            self._run(on_commit, until)
        except BrokerUnreachable:
            if not self._stop.is_set():  # else it was told to end before there was a connection
                raise

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
                most_bytes=_MOST_BYTES,
                declares=declares,
                on_notice=self._hear,
                listener=own_name(),
                hears=topology.PRESENCE_EXCHANGE,
            ).open(timeout, self._stop.is_set) as consumer,
            self._seen(publisher, consumer),
        ):
            deaf_at = -math.inf
            while not self._stop.is_set():
                self._pulse.beat()
                publisher.raise_if_dead()
                if not consumer.consuming:
                    self._fleet.note_deaf()
                    deaf_at = awake()
                took = self._collect_once(consumer, publisher, on_commit)
                done = self._finish.is_set() and not took and self._has_all(deaf_at)
                if self._newer is not None or done:
                    break
                looked = self._give_notice(publisher)
                if looked:
                    # On the consumer's connection, which an alarm of the broker does not block.
                    self._directory.ask(consumer, topology.CORE_QUEUES)
                    self._take_early()
                if (looked or took) and _says_so(until):
                    break
            consumer.stop_taking(timeout_seconds=2.0)
            try:
                publisher.flush(_FLUSH_SECONDS)
                # What ends us may be that a run was cancelled: workers have to hear of it.
                self._notice_due = 0.0
                self._give_notice(publisher)
                publisher.flush(_FLUSH_SECONDS)
            except BrokerUnreachable as error:
                log.warning("claims.unconfirmed", reason=str(error))  # they come again
            if self._newer is not None:
                consumer.give_back([self._newer[0]])
                log.error("message.newer", queue=self._newer[0].queue, reason=str(self._newer[1]))
                raise self._newer[1]

    def _has_all(self, deaf_at: float) -> bool:
        """In a lull: whether it means that nothing is left, or that we have waited long enough."""
        now = awake()
        return now - deaf_at > _SETTLED_SECONDS or now > self._finish_by

    @contextmanager
    def _seen(self, publisher: Publisher, consumer: Consumer) -> Iterator[None]:
        """By whoever asks for its metrics, while it runs."""
        self._pulse.beat()
        self._links = publisher, consumer
        gauges = Gauges(self._fleet, self._directory, self._run_counts)
        REGISTRY.register(gauges)
        try:
            yield
        finally:
            REGISTRY.unregister(gauges)
            self._links = None
            self._run_counts.close()

    def _hear(self, body: bytes) -> None:
        """A worker's report, on the link's thread."""
        try:
            self._fleet.note(decode(WorkerHeartbeat, body))
        except (MessageInvalid, MessageTooNew) as error:
            log.warning("report.refused", reason=str(error))

    def _collect_once(
        self, consumer: Consumer, publisher: Publisher, on_commit: Callable[[Incoming], None]
    ) -> bool:
        """One transaction of what has come. False when nothing had."""
        taken: list[tuple[Delivery, Message]] = []
        deadline: float | None = None
        outcomes = size = 0
        while (
            outcomes < self._settings.store_commit_verdicts
            and len(taken) < _COMMIT_MESSAGES
            and size < _COMMIT_BYTES
            and (deadline is None or time.monotonic() < deadline)
        ):
            # Under load the next message is there already; a lull is the moment to commit.
            announced_by: float | None = None
            if self._again:
                delivery, announced_by = self._again.popleft()
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
                self._newer = delivery, error
                break
            except NotAnnounced as error:
                self._keep_early(delivery, announced_by, error, consumer, publisher)
            except StoreError as error:
                log.error("store.waiting", reason=str(error))
                self._early.append((delivery, time.monotonic() + _ANNOUNCEMENT_SECONDS))
                self._stop.wait(_FIRST_PAUSE_SECONDS)
                break
            except MessageInvalid as error:
                _refuse(delivery, error, consumer, publisher)
            else:
                outcomes += _outcomes(message)
                taken.append((delivery, message))
        if taken:
            self._commit(taken, consumer, publisher, on_commit)
        return bool(taken)

    def _commit(
        self,
        taken: Sequence[tuple[Delivery, Message]],
        consumer: Consumer,
        publisher: Publisher,
        on_commit: Callable[[Incoming], None],
    ) -> None:
        """In one transaction, or in several where the store refuses a value in it: the message with
        that value is found by halving and set aside, and all others are committed.
        """
        incoming = Incoming.of(message for _, message in taken)
        try:
            if not self._write(incoming):
                return
        except StoreRefused as error:
            if len(taken) == 1:
                _refuse(taken[0][0], error, consumer, publisher)
                return
            middle = len(taken) // 2
            for half in (taken[:middle], taken[middle:]):
                self._commit(half, consumer, publisher, on_commit)
            return
        consumer.acknowledge(
            delivery for delivery, each in taken if not isinstance(each, ClaimBatch)
        )
        committed = time.monotonic()
        for delivery, _ in taken:
            LAG_SECONDS.observe(committed - delivery.came_at)
        on_commit(incoming)
        for delivery, message in taken:
            if not isinstance(message, ClaimBatch):
                continue
            try:
                send_on(message, delivery, self._store, consumer, publisher)
            except (MessageInvalid, StoreRefused) as error:
                _refuse(delivery, error, consumer, publisher)
            except StoreError as error:
                log.error("store.waiting", reason=str(error))
                consumer.give_back([delivery])

    def _keep_early(
        self,
        delivery: Delivery,
        announced_by: float | None,
        error: NotAnnounced,
        consumer: Consumer,
        publisher: Publisher,
    ) -> None:
        """Its announcement may have come by the time that it is taken again."""
        now = time.monotonic()
        announced_by = announced_by or now + _ANNOUNCEMENT_SECONDS
        if now >= announced_by or len(self._early) >= _MOST_EARLY:
            _refuse(delivery, error, consumer, publisher)
        else:
            self._early.append((delivery, announced_by))

    def _take_early(self) -> None:
        self._again.extend(self._early)
        self._early.clear()

    def _write(self, incoming: Incoming) -> bool:
        """Commit, however long it takes. False when told to stop before that was possible.

        Raises StoreRefused when the store will not take it however long we wait.
        """
        for failures in count(1):
            self._pulse.beat()
            try:
                with COMMIT_SECONDS.time():
                    gained = self._store.write(incoming)
            except StoreRefused:
                self.waiting_for = None
                raise
            except StoreError as error:
                COMMIT_FAILURES.inc()
                pause = growing_pause(
                    failures,
                    first_seconds=_FIRST_PAUSE_SECONDS,
                    longest_seconds=_LONGEST_PAUSE_SECONDS,
                )
                self.waiting_for = str(error)
                log.error("store.waiting", reason=str(error), again_in_seconds=round(pause, 1))
                if self._finish.is_set() or self._stop.wait(pause):
                    break
            else:
                self.waiting_for = None
                self._directory.note(gained)
                self._run_counts.note(incoming.run_ids())
                self._nowhere.note(incoming.run_ids())
                count_in(incoming, gained.total() - len(incoming.dead))
                return True
        return False

    def _give_notice(self, publisher: Publisher) -> bool:
        """Now and then tell every worker which submissions are cancelled, and which contexts have
        claims waiting.

        False when it is not the time.
        """
        now = time.monotonic()
        if now < self._notice_due or publisher.pending:
            return False
        self._notice_due = now + CONTROL_UPDATE_SECONDS
        try:
            contexts = self._directory.look()
            cancelled = self._store.cancelled_submissions(self._directory.settled_runs())
            self._nowhere.look()
        except StoreError:
            return False  # whoever commits says so
        notice = ControlUpdate(cancelled=cancelled, contexts=contexts)
        something = bool(notice.cancelled or notice.contexts)
        if something or self._noticed:
            message = Outgoing.of(notice, topology.NOTICES_EXCHANGE, "", notice=True)
            publisher.publish(message)
            sent_bytes = len(message.body) * len(self._fleet.workers())
            self._notice_due = now + max(
                CONTROL_UPDATE_SECONDS, sent_bytes / _NOTICE_BYTES_PER_SECOND
            )
        self._noticed = something
        return True


def _says_so(until: Callable[[], bool]) -> bool:
    try:
        return until()
    except StoreError:
        return False  # asked again


def _kind(delivery: Delivery) -> type[Message]:
    """What a message of its queue is; on the queue of verdicts workers tell of their starts too."""
    if delivery.queue == topology.VERDICTS_QUEUE and delivery.kind == ContextReady.wire_type:
        return ContextReady
    return _KINDS[delivery.queue]


def _outcomes(message: Message) -> int:
    if isinstance(message, VerdictBatch):
        return len(message.verdicts)
    return int(isinstance(message, DeadClaim))


def _refuse(
    delivery: Delivery, error: KeepwarmError, consumer: Consumer, publisher: Publisher
) -> None:
    REFUSED.inc()
    log.error("message.refused", queue=delivery.queue, reason=str(error))
    publisher.publish(delivery.refused(str(error), lambda: consumer.acknowledge([delivery])))


def send_on(
    batch: ClaimBatch,
    delivery: Delivery,
    store: Store,
    consumer: Consumer,
    publisher: Publisher,
) -> None:
    """Publish those claims of a returned batch that are still wanted, and acknowledge it once the
    broker has them. The batch is one that `Submissions.checked` has let through.

    Raises MessageInvalid; StoreError when the store cannot say what is wanted.
    """
    run_id = batch.run.run_id
    wanted: list[int] = []
    if store.wants(batch.submission_id):
        done = store.finished(run_id, [claim.claim_id for claim in batch.claims])
        places = {claim.claim_id: place for place, claim in enumerate(batch.claims)}
        wanted = [place for claim_id, place in places.items() if claim_id not in done]
    log.info("claims.returned", run=run_id, claims=len(batch.claims), sent_on=len(wanted))
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
