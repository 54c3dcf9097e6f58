"""A worker's time with one context: take batches, infer, settle them, and drain at the end.

`BatchProcessor` does what happens to each batch: take, infer, settle, or quarantine.
`ContextSession` owns the engine, runs the main loop that feeds a pool of threads, and drains.
"""

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

import structlog

from services.broker import BrokerAddress, Consumer, Delivery, Outgoing, Publisher
from services.contexts.engine_client import EngineClient, Interrupted
from services.contexts.lease import EngineLease
from services.contexts.plan import EnginePlan
from services.contexts.protocol import State
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
from services.gpu_worker.concurrency import AdaptiveConcurrency
from services.gpu_worker.crashes import CrashRecords
from services.gpu_worker.device_time import DeviceTime, Use
from services.gpu_worker.fault_isolation import FaultIsolation, prompt_key
from services.gpu_worker.heartbeat import ControlState, HeartbeatSender
from services.gpu_worker.in_flight import InFlightBatch, WorkerIdentity
from services.gpu_worker.inference import Inference, InferenceResult, WorkerFailure
from services.gpu_worker.metrics import (
    BATCH_SECONDS,
    BATCHES_IN_FLIGHT,
    CANCELLED,
    QUARANTINED_BATCHES,
)
from services.models.tokenizer import ModelTokenizer
from services.node.device import Device
from services.telemetry import TimedLock, Watchdog

# How long the main loop waits for a batch or for a thread before it checks everything else again.
_TAKE_TIMEOUT_SECONDS = 0.2
# How long a small batch waits for others to share its request while the engine is busy.
_LINGER_SECONDS = 0.02
# How long claims that our engine has declined before are kept before they are returned again.
_DECLINED_DELAY_SECONDS = 5
_STOP_TAKING_SECONDS = 2.0
# A batch that was delivered more often may end its workers without leaving evidence, or all of them
# were preempted.
_MAX_DELIVERIES = 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProcessor:
    """Processes the batches of one context, from their delivery to their settlement.

    A batch is acknowledged after the broker has confirmed all its results. A batch that the engine
    failed with is quarantined until `isolate_next` runs, when nothing else uses the engine.
    `take` is for one thread; the other methods may run on several at once.
    """

    context_id: str
    inference: Inference
    fault_isolation: FaultIsolation
    concurrency: AdaptiveConcurrency
    consumer: Consumer
    publisher: Publisher
    identity: WorkerIdentity
    control: ControlState
    crashes: CrashRecords
    device_time: DeviceTime
    on_answer: Callable[[], None]
    """Called with each answer of the engine."""
    engine_name: str = ""
    """The name of this worker's engine, unique across nodes."""
    other_engine_seconds: float = 0
    """How long claims that this engine cannot answer wait for another engine."""
    in_flight: set[InFlightBatch] = field(default_factory=set)
    quarantined: list[InFlightBatch] = field(default_factory=list)
    delayed: deque[tuple[float, InFlightBatch]] = field(default_factory=deque)
    """Batches that this engine has declined before, with the time when each is returned."""
    warned: set[str] = field(default_factory=set)
    """Keys of the warnings that are logged once a run."""

    # Take.

    def take(self, timeout_seconds: float, *, linger: bool) -> list[Delivery]:
        """One batch, or as many small ones as share a request. With `linger`, wait a moment for
        more small ones.
        """
        delivery = self.consumer.take(timeout_seconds)
        deadline = time.monotonic() + (_LINGER_SECONDS if linger else 0)
        deliveries: list[Delivery] = []
        while delivery is not None:
            deliveries.append(delivery)
            if len(deliveries) >= self.concurrency.batches_per_request:
                break
            delivery = self.consumer.take(max(0.0, deadline - time.monotonic()))
        return deliveries

    def process(self, deliveries: Sequence[Delivery]) -> None:
        """Accept the batches, infer, and settle or quarantine each.

        Raises MessageTooNew after the other batches are settled and consuming has stopped: the
        broker gives such messages to a worker that can read them.
        """
        batches: list[InFlightBatch] = []
        too_new: list[tuple[Delivery, MessageTooNew]] = []
        for delivery in deliveries:
            try:
                batch = self._accept(delivery)
            except MessageTooNew as error:
                too_new.append((delivery, error))
            else:
                batches += [] if batch is None else [batch]
        self.consumer.set_prefetch(self.concurrency.batch_limit)
        batches = self._within_claim_limit(batches)
        for _, group in groupby(batches, key=lambda batch: batch.message.run.prompt.prompt_id):
            same_prompt = list(group)
            try:
                self._infer(same_prompt)
            except Exception as error:
                self._reject(same_prompt, error)
        if too_new:
            # Stop first: the broker would deliver the returned message here again.
            self.consumer.stop_taking(_STOP_TAKING_SECONDS)
            self.consumer.give_back([delivery for delivery, _ in too_new])
            log.error("message.newer", reason=str(too_new[0][1]))
            raise too_new[0][1]

    def _accept(self, delivery: Delivery) -> InFlightBatch | None:
        """The batch, trimmed to what can be finished in time. None when there is nothing to infer
        now: the message is unusable or cancelled, or the batch is delayed or quarantined.
        """
        try:
            batch = InFlightBatch(delivery, self.engine_name, self.other_engine_seconds)
            if batch.message.run.context.context_id != self.context_id:
                raise MessageInvalid("the batch's context is not its queue's")
        except MessageTooNew:
            raise
        except Exception as error:
            self._dead_letter(delivery, error)
            return None
        if batch.message.submission_id in self.control.cancelled:
            log.info("batch.cancelled", run=batch.message.run.run_id, claims=len(batch.unresolved))
            CANCELLED.inc(len(batch.unresolved))
            self.consumer.acknowledge([delivery])
            return None
        self.in_flight.add(batch)
        if batch.declined_here_before:
            self.delayed.append((time.monotonic() + _DECLINED_DELAY_SECONDS, batch))
            return None
        if delivery.redelivered:
            self.crashes.collect()
        if self.crashes.any:
            for index, key in enumerate(batch.keys(range(len(batch.message.claims)))):
                if crash := self.crashes.get(key):
                    batch.record_crash(index, crash)
        if not batch.crashes and _may_end_workers(batch):
            log.warning("batch.split", deliveries=delivery.attempt, claims=len(batch.unresolved))
            batch.return_each(self.consumer, self.publisher)
            self.in_flight.discard(batch)
            return None
        if batch.failed_before or self.crashes.get(prompt_key(batch.message.run.prompt)):
            self._quarantine(batch)
            return None
        self._trim(batch)
        return batch

    def _trim(self, batch: InFlightBatch) -> None:
        """Keep the claims that can be finished within the prefetch time, and return the others."""
        claims = len(batch.unresolved)
        keep = self.concurrency.accept(claims, redelivered=batch.delivery.redelivered)
        if keep < claims:
            log.debug("batch.trimmed", kept=keep, returned=claims - keep)
            batch.trim(keep, self.consumer, self.publisher)

    def _within_claim_limit(self, batches: Sequence[InFlightBatch]) -> list[InFlightBatch]:
        """The first batch, and those after it that fit the claim limit; the others are returned.
        More may come together than fit when batches become larger.
        """
        kept: list[InFlightBatch] = []
        claims = 0
        for batch in batches:
            claims += len(batch.unresolved)
            if kept and claims > self.concurrency.claim_limit:
                self.settle(batch)
            else:
                kept.append(batch)
        return kept

    # Infer.

    def _infer(self, batches: Sequence[InFlightBatch]) -> None:
        """Ask about batches with the same prompt in one request; settle or quarantine each."""
        requested = [list(batch.unresolved) for batch in batches]
        claims = [
            claim
            for batch, indexes in zip(batches, requested, strict=True)
            for claim in batch.claims(indexes)
        ]
        keys = [
            key
            for batch, indexes in zip(batches, requested, strict=True)
            for key in batch.keys(indexes)
        ]
        for batch in batches:
            BATCH_SECONDS.labels("waiting").observe(time.monotonic() - batch.delivery.received_at)
        start = self.concurrency.begin()
        with self.crashes.recorded(keys):
            outcome = self.inference.infer(
                batches[0].message.run.prompt, claims, on_answer=self.on_answer
            )
        seconds = self.concurrency.end(start, 0 if outcome.failure else len(outcome.verdicts))
        self.consumer.set_prefetch(self.concurrency.batch_limit)
        self._warn_of_low_mass(batches[0], outcome)
        parts = outcome.split([len(indexes) for indexes in requested])
        for batch, indexes, part in zip(batches, requested, parts, strict=True):
            BATCH_SECONDS.labels("inferring").observe(outcome.engine_seconds)
            batch.record(indexes, part)
            self._warn_of_declined(batch, part)
        unanswered = sum(len(batch.unresolved) - batch.declined for batch in batches)
        self.device_time.record_batch(
            seconds, answered=len(claims) - unanswered, requested=len(claims)
        )
        failed = bool(unanswered) and not isinstance(outcome.failure, Interrupted)
        if failed:
            log.warning("batch.failed", claims=unanswered, reason=str(outcome.failure))
            self.fault_isolation.handle_failure(outcome.failure)
        for batch, indexes in zip(batches, requested, strict=True):
            if failed and len(batch.unresolved) > batch.declined:
                batch.record_failure(indexes)
                self._quarantine(batch)
            else:
                self.settle(batch)

    def _warn_of_low_mass(self, batch: InFlightBatch, outcome: InferenceResult) -> None:
        """Log once a run that its label words hold almost none of the probability."""
        run_id = batch.message.run.run_id
        answers = [(verdict.mass, verdict.raw_text) for verdict in outcome.verdicts.values()]
        if not answers or run_id in self.warned:
            return
        if found := find_low_mass(answers):
            self.warned.add(run_id)
            log.warning("labels.unlikely", run=run_id, median_mass=found[0], model_says=found[1])

    def _warn_of_declined(self, batch: InFlightBatch, outcome: InferenceResult) -> None:
        """Log once a run that this engine cannot answer some of its claims."""
        run_id = batch.message.run.run_id
        if batch.declined and (key := f"declined {run_id}") not in self.warned:
            self.warned.add(key)
            example = next(iter(outcome.declined.values()))
            log.warning(
                "claims.declined",
                run=run_id,
                claims=batch.declined,
                reason=example.cause.reason.value,
                detail=example.cause.detail,
                next_step="they are returned for another engine, and become dead claims if none "
                f"answers them within {self.other_engine_seconds:g} s",
            )

    def _quarantine(self, batch: InFlightBatch) -> None:
        QUARANTINED_BATCHES.inc()
        self.quarantined.append(batch)

    def isolate_next(self) -> None:
        """Isolate the faulty claims of the first quarantined batch, and settle it."""
        batch = self.quarantined.pop(0)
        seconds_before = batch.engine_seconds
        try:
            try:
                self.fault_isolation.isolate(batch)
            except KeepwarmError:
                self.settle(batch)
                raise
            finally:
                self.device_time.record_batch(
                    batch.engine_seconds - seconds_before, answered=1, requested=1
                )
            self.settle(batch)
        except Exception as error:
            self._reject([batch], error)

    # Settle.

    def settle(self, batch: InFlightBatch) -> None:
        """Publish the batch's outcomes, and return its unresolved claims."""
        batch.settle(self.consumer, self.publisher, self.identity)
        self.in_flight.discard(batch)
        if batch.crashes:
            self.crashes.forget(batch.keys(batch.crashes))

    def return_delayed(self) -> None:
        """Return the delayed batches whose delay is over: another worker may take them now."""
        while self.delayed and self.delayed[0][0] <= time.monotonic():
            _, batch = self.delayed.popleft()
            batch.waited_seconds += _DECLINED_DELAY_SECONDS
            self.settle(batch)

    def _reject(self, batches: Sequence[InFlightBatch], error: Exception) -> None:
        """Our own code failed with these batches, and not because of one claim: move their messages
        to `dead-messages`. An error that ends the worker is raised again.
        """
        if isinstance(error, BrokerError | EngineError | WorkerFailure):
            raise error
        for batch in batches:
            if batch in self.in_flight and batch not in self.quarantined:
                self._dead_letter(batch.delivery, error)
                self.in_flight.discard(batch)

    def _dead_letter(self, delivery: Delivery, error: Exception) -> None:
        reason = logged = str(error)
        if not isinstance(error, MessageInvalid):
            # The error's text may quote a claim, so only its type and origin are logged.
            reason = f"the worker failed with it: {error!r}"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            logged = f"{type(error).__name__} in {frame.filename}:{frame.lineno}"
        log.error("batch.refused", reason=logged, message_id=delivery.message_id)
        self.publisher.publish(
            delivery.as_dead_message(reason, lambda: self.consumer.acknowledge([delivery]))
        )


class ContextSession:
    """A worker's time with one context, from the engine's lease to the drain.

    Threads: the caller's thread runs the main loop, which takes batches and watches the engine.
    `batches_in_flight` pool threads each process one batch, or several small ones together, so that
    the engine's continuous batching always has work. Each link to the broker has its own thread. A
    quarantined batch is processed as the only job.
    """

    def __init__(
        self,
        spec: ContextSpec,
        device: Device,
        settings: Settings,
        *,
        identity: WorkerIdentity,
        stop: threading.Event,
        control: ControlState,
        heartbeats: HeartbeatSender,
        watchdog: Watchdog,
        tokenizing: TimedLock,
        device_time: DeviceTime,
        crashes: CrashRecords,
    ) -> None:
        """Raises ModelError or UsageError before anything is started."""
        self.spec = spec
        self._settings = settings
        self._identity = identity
        self._stop = stop
        self._control = control
        self._heartbeats = heartbeats
        self._watchdog = watchdog
        self._tokenizing = tokenizing
        self._device_time = device_time
        self._crashes = crashes
        tokenizer = ModelTokenizer.load(spec)
        plan = EnginePlan.of(spec, device, settings)
        self._engine = EngineLease(plan, settings, self._on_engine_wait)
        self._engine_name = f"{socket.gethostname()}/{plan.name}"
        self._inference = Inference(
            tokenizer,
            self._engine.client,
            max_model_tokens=spec.max_model_tokens,
            engine_max_tokens=lambda: self._engine.max_model_tokens,
            tokenizing=tokenizing,
        )
        self._fault_isolation = FaultIsolation(
            self._engine, self._inference, settings, stop, crashes
        )
        self._concurrency = AdaptiveConcurrency(
            settings.prefetch_seconds, settings.batches_in_flight
        )
        self._publisher: Publisher | None = None
        self._processor: BatchProcessor | None = None
        self._reported_starts = 0
        self._last_work_at = self._ready_at = time.monotonic()

    @property
    def claims_per_second(self) -> float | None:
        """As measured on this context; None until a batch was answered."""
        return self._concurrency.rate

    @property
    def idle_seconds(self) -> float:
        """How long there has been nothing to do; 0 while a batch is in flight."""
        return time.monotonic() - self._last_work_at

    @property
    def ready_seconds(self) -> float:
        """How long the context has been ready."""
        return time.monotonic() - self._ready_at

    @property
    def readiness_error(self) -> str | None:
        """Why it cannot answer claims now. Never waits."""
        if self._engine.state != "warm":
            return f"its engine is {self._engine.state or 'not there'}"
        if self._processor is None:
            return "no connection to the broker"
        return self._processor.consumer.readiness_error

    @property
    def engine_state(self) -> State | None:
        """The engine's state in the keeper's latest message."""
        return self._engine.state

    @property
    def client(self) -> EngineClient:
        """The client of its engine."""
        return self._engine.client

    def run(
        self, publisher: Publisher, choose_next: Callable[[], ContextSpec | None]
    ) -> ContextSpec | None:
        """Serve until `stop` is set or `choose_next`, called several times a second, returns
        another context; then drain. Returns that context, None after `stop`.

        Raises BrokerError when the broker refuses the connection, EngineStartError when the engine
        cannot be started; batches in flight are returned before. Waits for an unreachable broker.
        """
        self._publisher = publisher
        self._on_engine_wait()
        # Claims are taken only once there is an engine for them. An engine that never ran here may
        # be misconfigured, so its first start is tried only once and the user sees the error early.
        if not self._fault_isolation.start_engine(attempts=1):
            return None
        self._ready_at = self._last_work_at = time.monotonic()
        with Consumer(
            BrokerAddress.from_settings(self._settings),
            "worker-claims",
            queues=[topology.claims_queue(self.spec.context_id)],
            prefetch=self._concurrency.batch_limit,
            on_fanout_message=self._control.receive,
            listener=self._identity.worker_id,
        ) as consumer:
            if not consumer.open_until_stopped(self._stop, lambda: self._tick(0, busy=False)):
                return None
            self._processor = BatchProcessor(
                context_id=self.spec.context_id,
                inference=self._inference,
                fault_isolation=self._fault_isolation,
                concurrency=self._concurrency,
                consumer=consumer,
                publisher=publisher,
                identity=self._identity,
                control=self._control,
                crashes=self._crashes,
                device_time=self._device_time,
                on_answer=self._heartbeats.count_answer,
                engine_name=self._engine_name,
                other_engine_seconds=self._settings.other_engine_seconds,
            )
            return self._serve(self._processor, choose_next)

    def pass_demand_to_keeper(self) -> None:
        """Tell the keeper how many claims wait for each context: it may have to evict an engine."""
        self._engine.send_demand(
            {entry.context.context_id: entry.claims_ready for entry in self._control.demand}
        )

    def close(self) -> None:
        """Release the lease. The engine stays warm for the next worker."""
        self._engine.close()

    def _serve(
        self, processor: BatchProcessor, choose_next: Callable[[], ContextSpec | None]
    ) -> ContextSpec | None:
        pool = ThreadPoolExecutor(self._settings.batches_in_flight, thread_name_prefix="batch")
        jobs: set[Future[None]] = set()
        log.info("worker.taking", worker=self._identity.worker_id)
        try:
            while not self._stop.is_set():
                if (next_context := choose_next()) is not None:
                    return next_context
                _raise_job_errors(jobs)
                processor.publisher.raise_if_dead()
                self._tick(len(processor.in_flight), busy=bool(jobs))
                self._send_heartbeat("serving" if self._engine.state == "warm" else "starting")
                self._report_startup(processor.publisher)
                processor.return_delayed()
                if jobs:
                    self._last_work_at = time.monotonic()
                if processor.quarantined or not self._engine.alive:
                    if jobs:  # requests to a dead engine fail at once
                        wait(jobs, timeout=_TAKE_TIMEOUT_SECONDS)
                        continue
                    if not self._ensure_engine():
                        return None
                    if processor.quarantined:  # as the only job: nothing else uses the engine
                        jobs.add(pool.submit(processor.isolate_next))
                    continue
                deliveries = processor.take(_TAKE_TIMEOUT_SECONDS, linger=bool(jobs))
                if deliveries:
                    self._last_work_at = time.monotonic()
                    jobs.add(pool.submit(processor.process, deliveries))
            return None
        finally:
            self._drain(pool, jobs, processor)
            pool.shutdown(wait=False, cancel_futures=True)

    def _ensure_engine(self) -> bool:
        """Start the engine again if it is gone. False when told to stop meanwhile."""
        if self._engine.alive:
            return True
        log.error("engine.died", reason=self._engine.ended_because, log=str(self._engine.log_file))
        started = self._fault_isolation.start_engine(self._settings.engine_start_attempts)
        # The start is not idle time, and its cost should pay off before the worker switches.
        self._ready_at = self._last_work_at = time.monotonic()
        return started

    def _drain(
        self, pool: ThreadPoolExecutor, jobs: set[Future[None]], processor: BatchProcessor
    ) -> None:
        """Finish the batches that can be finished in half of the grace period; return the rest,
        claim by claim.
        """
        # The other half is for confirmations and for the end of the engine.
        deadline = time.monotonic() + 0.5 * self._settings.grace_seconds
        log.info("worker.draining", batches_in_flight=len(jobs) + len(processor.quarantined))
        self._send_heartbeat("draining")
        processor.consumer.stop_taking(_STOP_TAKING_SECONDS)
        if self._engine.alive:
            wait(jobs, timeout=max(0.0, deadline - time.monotonic()))
        # Each job that is interrupted publishes its answers and returns its other claims.
        self._engine.client.interrupt()
        self._send_heartbeat("stopped" if self._stop.is_set() else "draining")
        confirmation_seconds = 0.15 * self._settings.grace_seconds
        wait(jobs, timeout=confirmation_seconds / 2)
        left = [*processor.quarantined, *(batch for _, batch in processor.delayed)]
        returned = [pool.submit(processor.settle, batch) for batch in left]
        wait(returned, timeout=confirmation_seconds / 2)
        try:
            processor.publisher.flush(timeout_seconds=confirmation_seconds)
        except BrokerError as error:
            # These batches are not acknowledged, so another worker answers them again.
            log.warning("verdicts.unconfirmed", reason=str(error))
        log.info("worker.drained")

    # What others see of it: watchdog, metrics, heartbeats, the report of the start.

    def _on_engine_wait(self) -> None:
        """Called several times a second while the engine starts."""
        self._watchdog.beat()
        self._device_time.lap("loading")
        self._send_heartbeat("starting")

    def _tick(self, batches_in_flight: int, *, busy: bool) -> None:
        """Called once in each iteration of the main loop."""
        self._watchdog.beat()
        timeout = self._settings.tokenizer_timeout_seconds
        if self._tokenizing.held_seconds > timeout:
            self._crashes.abort(
                f"the tokenizer took longer than {timeout:g} s "
                "(KEEPWARM_TOKENIZER_TIMEOUT_SECONDS), so the worker ended itself"
            )
        BATCHES_IN_FLIGHT.set(batches_in_flight)
        use: Use = "batches" if busy else "idle"
        self._device_time.lap(use if self._engine.state == "warm" else "loading")

    def _send_heartbeat(self, state: WorkerState) -> None:
        if self._publisher is not None:
            batches = [] if self._processor is None else list(self._processor.in_flight)
            self._heartbeats.send_if_due(
                state,
                self._publisher,
                context_id=self.spec.context_id,
                restart_reason=self._engine.restart_reason,
                claims_per_second=self._concurrency.rate,
                batches_in_flight=len(batches),
                claims_in_flight=sum(len(batch.unresolved) for batch in batches),
            )

    def _report_startup(self, publisher: Publisher) -> None:
        """Tell the collector once for each start of the engine how long it took."""
        starts = self._engine.starts
        if starts == self._reported_starts:
            return
        startup_id = secrets.token_hex(8)
        ready = ContextReady(
            startup_id=startup_id,
            worker_id=self._identity.worker_id,
            context_id=self.spec.context_id,
            device=self._identity.device,
            warm=self._engine.warm,
            seconds=self._engine.seconds,
            phases=self._engine.phases or StartupPhases(),
        )
        # `offer`, because `publish` would block the main loop while the window is full.
        if publisher.offer(
            Outgoing.of(
                ready,
                topology.VERDICTS_EXCHANGE,
                topology.VERDICTS_QUEUE,
                message_id=f"startup-{startup_id}",
            )
        ):
            self._reported_starts = starts


def _may_end_workers(batch: InFlightBatch) -> bool:
    """Whether workers may have died of this batch. If so, its claims are returned one by one, and a
    single claim is returned to the end of the queue each time it is delivered again: whatever it
    does, all other claims are answered.
    """
    alone = batch.failed_before and len(batch.message.claims) == 1
    return batch.delivery.attempt > _MAX_DELIVERIES or (alone and batch.delivery.redelivered)


def _raise_job_errors(jobs: set[Future[None]]) -> None:
    """Remove finished jobs. An exception in one ends the worker."""
    for job in [job for job in jobs if job.done()]:
        jobs.remove(job)
        job.result()
