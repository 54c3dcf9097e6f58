"""One context, served: batches taken, answered, acknowledged once that is safe, and a drain."""

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import groupby

import structlog

from services.broker import BrokerAddress, Consumer, Delivery, Outgoing, Publisher
from services.contexts.attachment import Attachment
from services.contexts.completions import CompletionClient, Interrupted
from services.contexts.device import Device
from services.contexts.plan import EnginePlan
from services.contexts.records import State
from services.contracts import ContextReady, ContextSpec, Settings, StartupPhases, topology
from services.contracts.errors import BrokerUnreachable, MessageInvalid
from services.contracts.presence import WorkerState
from services.gpu_worker.device_time import Use
from services.gpu_worker.examination import Examination
from services.gpu_worker.in_hand import BatchInHand
from services.gpu_worker.inference import Inference
from services.gpu_worker.metrics import BATCH_SECONDS, CANCELLED, IN_HAND, SUSPECTS
from services.gpu_worker.pacing import Pace
from services.gpu_worker.reports import Doing
from services.gpu_worker.shift import Shift
from services.gpu_worker.tokenizer import ModelTokenizer

_TAKE_SECONDS = 0.2
# How long a small batch waits for others while the engine has work.
_LINGER_SECONDS = 0.02

log = structlog.get_logger(__name__)


class Serving:
    """A worker's time with one context, from the lease on its engine to the drain.

    Threads: the caller's takes batches and minds the engine; `batches_in_flight` pool threads each
    see one batch through, or several small ones together, so that the engine's continuous batching
    stays full; each link to the broker has its own. A batch is acknowledged after the broker has
    confirmed all that became of it. One that an engine failed with is a suspect, and is examined
    while there is no other job.
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
        self._engine = Attachment(EnginePlan.of(spec, device, settings), settings, self._load)
        self._inference = Inference(
            tokenizer, self._engine.client, max_model_tokens=spec.max_model_tokens
        )
        self._examination = Examination(self._engine, self._inference, settings, self._stop)
        self._publisher: Publisher | None = None
        self._consumer: Consumer | None = None
        self._in_hand: set[BatchInHand] = set()
        self._suspects: list[BatchInHand] = []
        self._pace = Pace(settings.horizon_seconds, settings.batches_in_flight)
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
    def unready(self) -> str | None:
        """Why it cannot answer claims now. Never waits."""
        if self._engine.state != "warm":
            return f"its engine is {self._engine.state or 'not there'}"
        return "no connection to the broker" if self._consumer is None else self._consumer.unready

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

        Raises BrokerError when the broker cannot be used, EngineStartError when there is no engine;
        claims in hand are given back before.
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
            on_notice=self._news.hear,
            listener=self._signature.worker_id,
        ).open(self._settings.broker_connect_timeout_seconds) as consumer:
            self._consumer = consumer
            self._serve(consumer, publisher, leave)

    def tell_demand(self) -> None:
        """Let the keeper know what waits: it may have to choose which engine goes."""
        self._engine.tell_demand(
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
            hands = list(self._in_hand)
            doing = Doing(
                context_id=self.spec.context_id,
                claims_per_second=self._pace.rate,
                batches_in_hand=len(hands),
                claims_in_hand=sum(len(hand.open) for hand in hands),
            )
            self._shift.reports.say(state, doing, self._publisher)

    def _note_time(self, *, busy: bool) -> None:
        """Once in each turn of the main loop."""
        self._shift.pulse.beat()
        IN_HAND.set(len(self._in_hand))
        use: Use = "batches" if busy else "idle"
        self._shift.device_time.lap(use if self._engine.state == "warm" else "loading")

    def _announce(self, publisher: Publisher) -> None:
        """Tell the collector what it took until there was an engine, once for each."""
        if self._engine.starts == self._announced:
            return
        self._announced = self._engine.starts
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
        publisher.publish(
            Outgoing.of(
                ready,
                topology.VERDICTS_EXCHANGE,
                topology.VERDICTS_QUEUE,
                message_id=f"startup-{startup_id}",
            )
        )

    def _serve(self, consumer: Consumer, publisher: Publisher, leave: Callable[[], bool]) -> None:
        pool = ThreadPoolExecutor(self._settings.batches_in_flight, thread_name_prefix="batch")
        work: set[Future[None]] = set()
        log.info("worker.taking", worker=self._signature.worker_id)
        try:
            while not self._stop.is_set() and not leave():
                _raise_bugs(work)
                self._note_time(busy=bool(work))
                self._say("serving" if self._engine.state == "warm" else "starting")
                self._announce(publisher)
                if work:
                    self._had_work_at = time.monotonic()
                if self._suspects or not self._engine.alive:
                    if work:  # whoever asks a dead engine comes back at once
                        wait(work, timeout=_TAKE_SECONDS)
                        continue
                    if not self._engine_is_well():
                        break
                    if self._suspects:  # as the only job, so that nobody else is at the engine
                        work.add(pool.submit(self._examine, consumer, publisher))
                    continue
                deliveries = self._take(consumer, linger=bool(work))
                if deliveries:
                    self._had_work_at = time.monotonic()
                    work.add(pool.submit(self._see_through, deliveries, consumer, publisher))
        finally:
            self._drain(pool, work, consumer, publisher)
            pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, consumer: Consumer, *, linger: bool) -> list[Delivery]:
        """A batch; or of small ones as many as make a request, those that are here or come soon."""
        delivery = consumer.take(_TAKE_SECONDS)
        deadline = time.monotonic() + (_LINGER_SECONDS if linger else 0)
        deliveries: list[Delivery] = []
        while delivery is not None:
            deliveries.append(delivery)
            if len(deliveries) >= self._pace.together:
                break
            delivery = consumer.take(max(0.0, deadline - time.monotonic()))
        return deliveries

    def _see_through(
        self, deliveries: Sequence[Delivery], consumer: Consumer, publisher: Publisher
    ) -> None:
        """On a pool thread: from deliveries to their settlement, or to the suspects."""
        hands = [
            hand
            for delivery in deliveries
            if (hand := self._take_in_hand(delivery, consumer, publisher)) is not None
        ]
        consumer.set_prefetch(self._pace.batches)
        for _, alike in groupby(hands, key=lambda hand: hand.batch.run.prompt.prompt_id):
            self._answer(list(alike), consumer, publisher)

    def _take_in_hand(
        self, delivery: Delivery, consumer: Consumer, publisher: Publisher
    ) -> BatchInHand | None:
        """The batch, as far as it can be finished within the horizon; None where nothing is to be
        answered now.
        """
        try:
            hand = BatchInHand(delivery)
            if hand.batch.run.context.context_id != self.spec.context_id:
                raise MessageInvalid("the batch wants another context than its queue's")
        except MessageInvalid as error:
            log.error("batch.refused", reason=str(error), message_id=delivery.message_id)
            publisher.publish(
                delivery.refused(str(error), lambda: consumer.acknowledge([delivery]))
            )
            return None
        if hand.batch.submission_id in self._news.cancelled:
            log.info("batch.cancelled", run=hand.batch.run.run_id, claims=len(hand.open))
            CANCELLED.inc(len(hand.open))
            consumer.acknowledge([delivery])
            return None
        self._in_hand.add(hand)
        if hand.suspect:
            self._suspect(hand)
            return None
        self._trim(hand, consumer, publisher)
        return hand

    def _answer(
        self, hands: Sequence[BatchInHand], consumer: Consumer, publisher: Publisher
    ) -> None:
        """Ask about batches with one prompt as one, and settle each, or suspect it."""
        asked = [list(hand.open) for hand in hands]
        claims = [
            claim
            for hand, places in zip(hands, asked, strict=True)
            for claim in hand.claims(places)
        ]
        for hand in hands:
            BATCH_SECONDS.labels("waiting").observe(time.monotonic() - hand.delivery.came_at)
        begun = self._pace.begin()
        outcome = self._inference.infer(hands[0].batch.run.prompt, claims)
        seconds = self._pace.end(begun, 0 if outcome.failure else len(outcome.verdicts))
        consumer.set_prefetch(self._pace.batches)
        parts = outcome.split([len(places) for places in asked])
        for hand, places, part in zip(hands, asked, parts, strict=True):
            BATCH_SECONDS.labels("inferring").observe(outcome.engine_seconds)
            hand.note(places, part)
        unanswered = sum(len(hand.open) for hand in hands)
        self._shift.device_time.computed(
            seconds, answered=len(claims) - unanswered, asked=len(claims)
        )
        failed = bool(unanswered) and not isinstance(outcome.failure, Interrupted)
        if failed:
            log.warning("batch.failed", claims=unanswered, reason=str(outcome.failure))
            self._examination.note_failure(outcome.failure)
        for hand, places in zip(hands, asked, strict=True):
            if failed and hand.open:
                hand.blame(places)
                self._suspect(hand)
            else:
                self._settle(hand, consumer, publisher)

    def _suspect(self, hand: BatchInHand) -> None:
        SUSPECTS.inc()
        self._suspects.append(hand)

    def _settle(self, hand: BatchInHand, consumer: Consumer, publisher: Publisher) -> None:
        hand.settle(consumer, publisher, self._signature)
        self._in_hand.discard(hand)

    def _trim(self, hand: BatchInHand, consumer: Consumer, publisher: Publisher) -> None:
        """Keep what is finished within the horizon; someone faster may have the rest."""
        claims = len(hand.open)
        keep = self._pace.take(claims)
        if keep < claims:
            log.debug("batch.trimmed", kept=keep, returned=claims - keep)
            hand.trim(keep, consumer, publisher)

    def _engine_is_well(self) -> bool:
        if self._engine.alive:
            return True
        log.error("engine.died", log=str(self._engine.log_file))
        return self._examination.start_engine(self._settings.engine_start_attempts)

    def _examine(self, consumer: Consumer, publisher: Publisher) -> None:
        """On a pool thread: the first suspect, to its settlement, or until told to stop."""
        hand = self._suspects.pop(0)
        before = hand.engine_seconds
        try:
            self._examination.examine(hand)
        finally:
            self._shift.device_time.computed(hand.engine_seconds - before, answered=1, asked=1)
            self._settle(hand, consumer, publisher)

    def _drain(
        self,
        pool: ThreadPoolExecutor,
        work: set[Future[None]],
        consumer: Consumer,
        publisher: Publisher,
    ) -> None:
        """Finish what can be finished in the grace period; return the rest, claim by claim."""
        # The other half is for the confirmations and for the engine's own end.
        deadline = time.monotonic() + 0.5 * self._settings.grace_seconds
        log.info("worker.draining", batches_in_hand=len(work) + len(self._suspects))
        self._say("draining")
        consumer.stop_taking(timeout_seconds=2.0)
        if self._engine.alive:
            wait(work, timeout=max(0.0, deadline - time.monotonic()))
        # Each thread in the midst of a batch now publishes what was answered and returns the rest.
        self._engine.client.interrupt()
        self._say("stopped" if self._stop.is_set() else "draining")
        confirmations = 0.15 * self._settings.grace_seconds
        wait(work, timeout=confirmations / 2)
        returned = [pool.submit(self._settle, hand, consumer, publisher) for hand in self._suspects]
        wait(returned, timeout=confirmations / 2)
        try:
            publisher.flush(timeout_seconds=confirmations)
        except BrokerUnreachable as error:
            # Their batches were not acknowledged: someone else will answer them again.
            log.warning("verdicts.unconfirmed", reason=str(error))
        log.info("worker.drained")


def _raise_bugs(work: set[Future[None]]) -> None:
    """Forget what is done; a bug in a job ends the worker, loudly."""
    for done in [future for future in work if future.done()]:
        work.remove(done)
        done.result()
