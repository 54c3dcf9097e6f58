"""A worker's time with one context: its engine, the batches it takes and answers, and the drain."""

import secrets
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Self

import structlog

from services.broker import BrokerAddress, Consumer, Delivery, Outgoing, Publisher
from services.contexts.engine_client import CompletionClient, Interrupted
from services.contexts.lease import EngineLease
from services.contexts.plan import EnginePlan
from services.contexts.records import State
from services.contracts import ContextReady, ContextSpec, Settings, StartupPhases, topology
from services.contracts.errors import (
    BrokerError,
    EngineError,
    KeepwarmError,
    MessageInvalid,
    MessageTooNew,
)
from services.contracts.heartbeats import WorkerState
from services.contracts.label_mass import find_low_mass
from services.gpu_worker.answer_count import AnswerCount
from services.gpu_worker.concurrency import AdaptiveConcurrency
from services.gpu_worker.crashes import Crashes
from services.gpu_worker.device_time import DeviceTime, Use
from services.gpu_worker.fault_isolation import FaultIsolation, prompt_key
from services.gpu_worker.heartbeat import ControlState, HeartbeatSender, Post, WorkerStatus
from services.gpu_worker.in_flight import InFlightBatch, WorkerIdentity
from services.gpu_worker.inference import Inference, Outcome, WorkerFailure
from services.gpu_worker.metrics import BATCH_SECONDS, CANCELLED, IN_HAND, SUSPECTS
from services.models.tokenizer import ModelTokenizer
from services.node.device import Device
from services.node.runtime_dir import open_runtime_dir
from services.telemetry import Watchdog

_TAKE_SECONDS = 0.2

# How long a small batch waits for others while the engine has work.
_LINGER_SECONDS = 0.02
# How long claims that came back to an engine that cannot answer them are kept from it.
_HOLD_SECONDS = 5
_STOP_SECONDS = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Shift:
    """Its name, what it heard, what it says of itself, and whether it has to go."""

    signature: WorkerIdentity
    reports: HeartbeatSender
    device_time: DeviceTime
    news: ControlState
    pulse: Watchdog
    stop: threading.Event
    answers: AnswerCount
    crashes: Crashes

    @classmethod
    def begin(
        cls, signature: WorkerIdentity, post: Post, runtime_dir: Path, *, log_progress: bool = False
    ) -> Self:
        """Raises UsageError for a runtime directory that is not ours."""
        reports, device_time = HeartbeatSender(signature, post), DeviceTime(signature.device)
        answers = AnswerCount(logged=log_progress)
        crashes = Crashes(open_runtime_dir(runtime_dir), signature.worker_id)
        stop = threading.Event()
        return cls(
            signature, reports, device_time, ControlState(), Watchdog(), stop, answers, crashes
        )


@dataclass(frozen=True, slots=True)
class Answering:
    """What becomes of the batches of one context, between a consumer and a publisher.

    A batch is acknowledged after the broker has confirmed all that became of it. One that the
    engine failed with waits among the `suspects`, to be examined while nobody else asks the engine.
    `take` is for one thread; the others may run on several at once.
    """

    context_id: str
    inference: Inference
    examination: FaultIsolation
    pace: AdaptiveConcurrency
    shift: Shift
    consumer: Consumer
    publisher: Publisher
    engine: str = ""
    """What this worker's engine is called beside those of other nodes."""
    patience_seconds: float = 0
    """How long claims that it cannot answer wait for another one."""
    held: deque[tuple[float, InFlightBatch]] = field(default_factory=deque)
    """Batches that came back to an engine that cannot answer them, and when they are returned."""
    in_flight: set[InFlightBatch] = field(default_factory=set)
    quarantined: list[InFlightBatch] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    """Runs of which it was said that the model hardly ever says a label word, or that our engine
    cannot answer some of their claims.
    """

    def take(self, timeout_seconds: float, *, linger: bool) -> list[Delivery]:
        """A batch; or of small ones as many as make a request, those that are here or come soon."""
        delivery = self.consumer.take(timeout_seconds)
        deadline = time.monotonic() + (_LINGER_SECONDS if linger else 0)
        deliveries: list[Delivery] = []
        while delivery is not None:
            deliveries.append(delivery)
            if len(deliveries) >= self.pace.together:
                break
            delivery = self.consumer.take(max(0.0, deadline - time.monotonic()))
        return deliveries

    def see_through(self, deliveries: Sequence[Delivery]) -> None:
        """From deliveries to their settlement, or to the suspects.

        Raises MessageTooNew, once the others are settled and nothing more is taken: whoever knows
        such messages gets them from the broker.
        """
        hands: list[InFlightBatch] = []
        newer: list[tuple[Delivery, MessageTooNew]] = []
        for delivery in deliveries:
            try:
                hand = self._take_in_hand(delivery)
            except MessageTooNew as error:
                newer.append((delivery, error))
            else:
                hands += [] if hand is None else [hand]
        self.consumer.set_prefetch(self.pace.batches)
        hands = self._within_allowance(hands)
        for _, alike in groupby(hands, key=lambda hand: hand.batch.run.prompt.prompt_id):
            batches = list(alike)
            try:
                self._answer(batches)
            except Exception as error:
                self._set_aside(batches, error)
        if newer:
            # First, or it would come back at once.
            self.consumer.stop_taking(_STOP_SECONDS)
            self.consumer.give_back([delivery for delivery, _ in newer])
            log.error("message.newer", reason=str(newer[0][1]))
            raise newer[0][1]

    def examine(self) -> None:
        """The first suspect, to its settlement, or until told to stop."""
        hand = self.quarantined.pop(0)
        before = hand.engine_seconds
        try:
            try:
                self.examination.examine(hand)
            except KeepwarmError:
                self.settle(hand)
                raise
            finally:
                self.shift.device_time.computed(hand.engine_seconds - before, answered=1, asked=1)
            self.settle(hand)
        except Exception as error:
            self._set_aside([hand], error)

    def settle(self, hand: InFlightBatch) -> None:
        """Tell the broker what became of it; what is open goes back."""
        hand.settle(self.consumer, self.publisher, self.shift.signature)
        self.in_flight.discard(hand)
        if hand.crashes:
            self.shift.crashes.forget(hand.keys(hand.crashes))

    def return_held(self) -> None:
        """Those that were kept from us for long enough: another worker may take them now."""
        while self.held and self.held[0][0] <= time.monotonic():
            _, hand = self.held.popleft()
            hand.waited_seconds += _HOLD_SECONDS
            self.settle(hand)

    def _take_in_hand(self, delivery: Delivery) -> InFlightBatch | None:
        """The batch, as far as it can be finished within the horizon; None where nothing is to be
        answered now.
        """
        try:
            hand = InFlightBatch(delivery, self.engine, self.patience_seconds)
            if hand.batch.run.context.context_id != self.context_id:
                raise MessageInvalid("the batch wants another context than its queue's")
        except MessageTooNew:
            raise
        except Exception as error:
            self._refuse(delivery, error)
            return None
        if hand.batch.submission_id in self.shift.news.cancelled:
            log.info("batch.cancelled", run=hand.batch.run.run_id, claims=len(hand.open))
            CANCELLED.inc(len(hand.open))
            self.consumer.acknowledge([delivery])
            return None
        self.in_flight.add(hand)
        if hand.came_back:
            self.held.append((time.monotonic() + _HOLD_SECONDS, hand))
            return None
        if delivery.redelivered:
            self.shift.crashes.look()
        if self.shift.crashes.any:
            for place, key in enumerate(hand.keys(range(len(hand.batch.claims)))):
                if crash := self.shift.crashes.of(key):
                    hand.note_crash(place, crash)
        if hand.suspect or self.shift.crashes.of(prompt_key(hand.batch.run.prompt)):
            self._suspect(hand)
            return None
        self._trim(hand)
        return hand

    def _within_allowance(self, hands: Sequence[InFlightBatch]) -> list[InFlightBatch]:
        """The first, and as many behind it as are finished within the horizon: where batches become
        larger, more came together than their size allows. The others go back.
        """
        kept: list[InFlightBatch] = []
        claims = 0
        for hand in hands:
            claims += len(hand.open)
            if kept and claims > self.pace.limit:
                self.settle(hand)
            else:
                kept.append(hand)
        return kept

    def _answer(self, hands: Sequence[InFlightBatch]) -> None:
        """Ask about batches with one prompt as one, and settle each, or suspect it."""
        asked = [list(hand.open) for hand in hands]
        claims = [
            claim
            for hand, places in zip(hands, asked, strict=True)
            for claim in hand.claims(places)
        ]
        for hand in hands:
            BATCH_SECONDS.labels("waiting").observe(time.monotonic() - hand.delivery.received_at)
        begun = self.pace.begin()
        with self.shift.crashes.asking(
            key for hand, places in zip(hands, asked, strict=True) for key in hand.keys(places)
        ):
            outcome = self.inference.infer(
                hands[0].batch.run.prompt, claims, on_answer=self.shift.answers.add
            )
        seconds = self.pace.end(begun, 0 if outcome.failure else len(outcome.verdicts))
        self.consumer.set_prefetch(self.pace.batches)
        parts = outcome.split([len(places) for places in asked])
        self._watch_mass(hands[0], outcome)
        for hand, places, part in zip(hands, asked, parts, strict=True):
            BATCH_SECONDS.labels("inferring").observe(outcome.engine_seconds)
            hand.note(places, part)
            self._watch_declined(hand, part)
        unanswered = sum(len(hand.open) - hand.declined for hand in hands)
        self.shift.device_time.computed(
            seconds, answered=len(claims) - unanswered, asked=len(claims)
        )
        failed = bool(unanswered) and not isinstance(outcome.failure, Interrupted)
        if failed:
            log.warning("batch.failed", claims=unanswered, reason=str(outcome.failure))
            self.examination.note_failure(outcome.failure)
        for hand, places in zip(hands, asked, strict=True):
            if failed and len(hand.open) > hand.declined:
                hand.record_failure(places)
                self._suspect(hand)
            else:
                self.settle(hand)

    def _watch_mass(self, hand: InFlightBatch, outcome: Outcome) -> None:
        """Log once a run that its label words hold nearly nothing of the probability."""
        run_id = hand.batch.run.run_id
        answers = [(verdict.mass, verdict.raw_text) for verdict in outcome.verdicts.values()]
        if not answers or run_id in self.warned:
            return
        if found := find_low_mass(answers):
            self.warned.add(run_id)
            log.warning("labels.unlikely", run=run_id, median_mass=found[0], model_says=found[1])

    def _watch_declined(self, hand: InFlightBatch, outcome: Outcome) -> None:
        """Log once a run that this engine cannot answer some of its claims."""
        run_id = hand.batch.run.run_id
        if hand.declined and (key := f"declined {run_id}") not in self.warned:
            self.warned.add(key)
            example = next(iter(outcome.declined.values()))
            log.warning(
                "claims.declined",
                run=run_id,
                claims=hand.declined,
                reason=example.refusal.reason.value,
                detail=example.refusal.detail,
                next_step="they are returned for another engine, and are dead claims when none "
                f"takes them within {self.patience_seconds:g} s",
            )

    def _set_aside(self, hands: Sequence[InFlightBatch], error: Exception) -> None:
        """Something of ours failed with batches that no claim can be blamed for: their messages go
        to `dead-messages`, and the worker goes on. What ends a worker is raised again.
        """
        if isinstance(error, BrokerError | EngineError | WorkerFailure):
            raise error
        for hand in hands:
            if hand in self.in_flight and hand not in self.quarantined:
                self._refuse(hand.delivery, error)
                self.in_flight.discard(hand)

    def _refuse(self, delivery: Delivery, error: Exception) -> None:
        reason = logged = str(error)
        if not isinstance(error, MessageInvalid):
            # Its text may quote a claim, so it is not logged; where it was raised says enough.
            reason = f"the worker failed with it: {error!r}"
            where = traceback.extract_tb(error.__traceback__)[-1]
            logged = f"{type(error).__name__} in {where.filename}:{where.lineno}"
        log.error("batch.refused", reason=logged, message_id=delivery.message_id)
        self.publisher.publish(
            delivery.refused(reason, lambda: self.consumer.acknowledge([delivery]))
        )

    def _suspect(self, hand: InFlightBatch) -> None:
        SUSPECTS.inc()
        self.quarantined.append(hand)

    def _trim(self, hand: InFlightBatch) -> None:
        """Keep what is finished within the horizon; someone faster may have the rest."""
        claims = len(hand.open)
        keep = self.pace.take(claims, redelivered=hand.delivery.redelivered)
        if keep < claims:
            log.debug("batch.trimmed", kept=keep, returned=claims - keep)
            hand.trim(keep, self.consumer, self.publisher)


class ContextSession:
    """A worker's time with one context, from the lease on its engine to the drain.

    Threads: the caller's takes batches and minds the engine; `batches_in_flight` pool threads each
    see one batch through, or several small ones together, so that the engine's continuous batching
    stays full; each link to the broker has its own. A suspect is examined while there is no other
    job.
    """

    def __init__(self, spec: ContextSpec, device: Device, settings: Settings, shift: Shift) -> None:
        """Raises ModelError or UsageError before anything is started."""
        self.spec = spec
        self._settings = settings
        self._shift = shift
        self._signature = shift.signature
        self._news = shift.news
        self._stop = shift.stop
        tokenizer = ModelTokenizer.load(spec)
        plan = EnginePlan.of(spec, device, settings)
        self._engine = EngineLease(plan, settings, self._load)
        self._engine_name = f"{socket.gethostname()}/{plan.name}"
        self._inference = Inference(
            tokenizer,
            self._engine.client,
            max_model_tokens=spec.max_model_tokens,
            engine_takes=lambda: self._engine.max_model_tokens,
        )
        self._examination = FaultIsolation(
            self._engine, self._inference, settings, self._stop, shift.crashes
        )
        self._publisher: Publisher | None = None
        self._answering: Answering | None = None
        self._pace = AdaptiveConcurrency(settings.prefetch_seconds, settings.batches_in_flight)
        self._announced = 0
        self._had_work_at = self._ready_at = time.monotonic()

    @property
    def claims_per_second(self) -> float | None:
        """As measured on this context; None until a batch was answered."""
        return self._pace.rate

    @property
    def idle_seconds(self) -> float:
        """How long the queue has given nothing; 0 while there is work in hand."""
        return time.monotonic() - self._had_work_at

    @property
    def ready_seconds(self) -> float:
        """How long the context has been ready."""
        return time.monotonic() - self._ready_at

    @property
    def readiness_error(self) -> str | None:
        """Why it cannot answer claims now. Never waits."""
        if self._engine.state != "warm":
            return f"its engine is {self._engine.state or 'not there'}"
        answering = self._answering
        return (
            "no connection to the broker"
            if answering is None
            else answering.consumer.readiness_error
        )

    @property
    def engine_state(self) -> State | None:
        """As last heard from its keeper."""
        return self._engine.state

    @property
    def client(self) -> CompletionClient:
        """Of its engine."""
        return self._engine.client

    def run(self, publisher: Publisher, leave: Callable[[], bool]) -> None:
        """Serve until `stop` is set or `leave`, asked several times a second, says so; then drain.

        Raises BrokerError when the broker refuses us, EngineStartError when there is no engine;
        claims in hand are given back before. A broker that is away is waited for.
        """
        # Claims are taken only once there is an engine for them. An engine that never ran here is
        # misconfigured: that is said now, not after several tries.
        self._publisher = publisher
        self._load()
        if not self._examination.start_engine(attempts=1):
            return
        self._ready_at = self._had_work_at = time.monotonic()
        with Consumer(
            BrokerAddress.from_settings(self._settings),
            "worker-claims",
            queues=[topology.claims_queue(self.spec.context_id)],
            prefetch=self._pace.batches,
            on_fanout_message=self._news.hear,
            listener=self._signature.worker_id,
        ) as consumer:
            if not consumer.open_until_stopped(self._stop, lambda: self._note_time(0, busy=False)):
                return
            self._answering = Answering(
                self.spec.context_id,
                self._inference,
                self._examination,
                self._pace,
                self._shift,
                consumer,
                publisher,
                self._engine_name,
                self._settings.other_engine_seconds,
            )
            self._serve(self._answering, leave)

    def tell_demand(self) -> None:
        """Let the keeper know what waits: it may have to choose which engine goes."""
        self._engine.send_demand(
            {line.context.context_id: line.claims_ready for line in self._news.contexts}
        )

    def close(self) -> None:
        """Give the engine back. It stays warm for whoever comes next."""
        self._engine.close()

    def _load(self) -> None:
        """Again and again while the engine is on its way."""
        self._shift.pulse.beat()
        self._shift.device_time.lap("loading")
        self._say("starting")

    def _say(self, state: WorkerState) -> None:
        if self._publisher is not None:
            hands = [] if self._answering is None else list(self._answering.in_flight)
            doing = WorkerStatus(
                context_id=self.spec.context_id,
                claims_per_second=self._pace.rate,
                batches_in_hand=len(hands),
                claims_in_hand=sum(len(hand.open) for hand in hands),
            )
            self._shift.reports.say(state, doing, self._publisher)

    def _note_time(self, batches_in_hand: int, *, busy: bool) -> None:
        """Once in each turn of the main loop."""
        self._shift.pulse.beat()
        self._shift.answers.log()
        IN_HAND.set(batches_in_hand)
        use: Use = "batches" if busy else "idle"
        self._shift.device_time.lap(use if self._engine.state == "warm" else "loading")

    def _announce(self, publisher: Publisher) -> None:
        """Tell the collector what it took until there was an engine, once for each."""
        starts = self._engine.starts
        if starts == self._announced:
            return
        startup_id = secrets.token_hex(8)
        ready = ContextReady(
            startup_id=startup_id,
            worker_id=self._signature.worker_id,
            context_id=self.spec.context_id,
            device=self._signature.device,
            warm=self._engine.warm,
            seconds=self._engine.seconds,
            phases=self._engine.phases or StartupPhases(),
        )
        # A full window would hold up whoever minds the engine.
        if publisher.offer(
            Outgoing.of(
                ready,
                topology.VERDICTS_EXCHANGE,
                topology.VERDICTS_QUEUE,
                message_id=f"startup-{startup_id}",
            )
        ):
            self._announced = starts

    def _serve(self, answering: Answering, leave: Callable[[], bool]) -> None:
        pool = ThreadPoolExecutor(self._settings.batches_in_flight, thread_name_prefix="batch")
        work: set[Future[None]] = set()
        log.info("worker.taking", worker=self._signature.worker_id)
        try:
            while not self._stop.is_set() and not leave():
                _raise_bugs(work)
                answering.publisher.raise_if_dead()
                self._note_time(len(answering.in_flight), busy=bool(work))
                self._say("serving" if self._engine.state == "warm" else "starting")
                self._announce(answering.publisher)
                answering.return_held()
                if work:
                    self._had_work_at = time.monotonic()
                if answering.quarantined or not self._engine.alive:
                    if work:  # whoever asks a dead engine comes back at once
                        wait(work, timeout=_TAKE_SECONDS)
                        continue
                    if not self._engine_is_well():
                        break
                    if (
                        answering.quarantined
                    ):  # as the only job, so that nobody else is at the engine
                        work.add(pool.submit(answering.examine))
                    continue
                deliveries = answering.take(_TAKE_SECONDS, linger=bool(work))
                if deliveries:
                    self._had_work_at = time.monotonic()
                    work.add(pool.submit(answering.see_through, deliveries))
        finally:
            self._drain(pool, work, answering)
            pool.shutdown(wait=False, cancel_futures=True)

    def _engine_is_well(self) -> bool:
        if self._engine.alive:
            return True
        log.error("engine.died", reason=self._engine.ended_because, log=str(self._engine.log_file))
        started = self._examination.start_engine(self._settings.engine_start_attempts)
        # Nobody was idle meanwhile, and what the start has cost is not thrown away at once.
        self._ready_at = self._had_work_at = time.monotonic()
        return started

    def _drain(
        self, pool: ThreadPoolExecutor, work: set[Future[None]], answering: Answering
    ) -> None:
        """Finish what can be finished in the grace period; return the rest, claim by claim."""
        # The other half is for the confirmations and for the engine's own end.
        deadline = time.monotonic() + 0.5 * self._settings.grace_seconds
        log.info("worker.draining", batches_in_hand=len(work) + len(answering.quarantined))
        self._say("draining")
        answering.consumer.stop_taking(timeout_seconds=2.0)
        if self._engine.alive:
            wait(work, timeout=max(0.0, deadline - time.monotonic()))
        # Each thread in the midst of a batch now publishes what was answered and returns the rest.
        self._engine.client.interrupt()
        self._say("stopped" if self._stop.is_set() else "draining")
        confirmations = 0.15 * self._settings.grace_seconds
        wait(work, timeout=confirmations / 2)
        left = [*answering.quarantined, *(hand for _, hand in answering.held)]
        returned = [pool.submit(answering.settle, hand) for hand in left]
        wait(returned, timeout=confirmations / 2)
        try:
            answering.publisher.flush(timeout_seconds=confirmations)
        except BrokerError as error:
            # Their batches were not acknowledged: someone else will answer them again.
            log.warning("verdicts.unconfirmed", reason=str(error))
        log.info("worker.drained")


def _raise_bugs(work: set[Future[None]]) -> None:
    """Forget what is done; a bug in a job ends the worker, loudly."""
    for done in [future for future in work if future.done()]:
        work.remove(done)
        done.result()
