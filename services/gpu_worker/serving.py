"""One context, served: its engine had, its batches taken and answered, and a drain."""

import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import structlog

from services.broker import BrokerAddress, Consumer, Outgoing, Publisher
from services.contexts.attachment import Attachment
from services.contexts.completions import CompletionClient
from services.contexts.device import Device
from services.contexts.plan import EnginePlan
from services.contexts.records import State
from services.contracts import ContextReady, ContextSpec, Settings, StartupPhases, topology
from services.contracts.errors import BrokerError
from services.contracts.presence import WorkerState
from services.gpu_worker.answering import Answering
from services.gpu_worker.device_time import Use
from services.gpu_worker.examination import Examination
from services.gpu_worker.inference import Inference
from services.gpu_worker.metrics import IN_HAND
from services.gpu_worker.pacing import Pace
from services.gpu_worker.reports import Doing
from services.gpu_worker.shift import Shift
from services.gpu_worker.tokenizer import ModelTokenizer

_TAKE_SECONDS = 0.2

log = structlog.get_logger(__name__)


class Serving:
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
        self._engine = Attachment(plan, settings, self._load)
        self._engine_name = f"{socket.gethostname()}/{plan.name}"
        self._inference = Inference(
            tokenizer,
            self._engine.client,
            max_model_tokens=spec.max_model_tokens,
            engine_takes=lambda: self._engine.max_model_tokens,
        )
        self._examination = Examination(
            self._engine, self._inference, settings, self._stop, shift.crashes
        )
        self._publisher: Publisher | None = None
        self._answering: Answering | None = None
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
        answering = self._answering
        return "no connection to the broker" if answering is None else answering.consumer.unready

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
            on_notice=self._news.hear,
            listener=self._signature.worker_id,
        ) as consumer:
            if not consumer.open_in_time(self._stop, lambda: self._note_time(0, busy=False)):
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
            hands = [] if self._answering is None else list(self._answering.in_hand)
            doing = Doing(
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
                self._note_time(len(answering.in_hand), busy=bool(work))
                self._say("serving" if self._engine.state == "warm" else "starting")
                self._announce(answering.publisher)
                answering.return_held()
                if work:
                    self._had_work_at = time.monotonic()
                if answering.suspects or not self._engine.alive:
                    if work:  # whoever asks a dead engine comes back at once
                        wait(work, timeout=_TAKE_SECONDS)
                        continue
                    if not self._engine_is_well():
                        break
                    if answering.suspects:  # as the only job, so that nobody else is at the engine
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
        log.error("engine.died", reason=self._engine.gone, log=str(self._engine.log_file))
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
        log.info("worker.draining", batches_in_hand=len(work) + len(answering.suspects))
        self._say("draining")
        answering.consumer.stop_taking(timeout_seconds=2.0)
        if self._engine.alive:
            wait(work, timeout=max(0.0, deadline - time.monotonic()))
        # Each thread in the midst of a batch now publishes what was answered and returns the rest.
        self._engine.client.interrupt()
        self._say("stopped" if self._stop.is_set() else "draining")
        confirmations = 0.15 * self._settings.grace_seconds
        wait(work, timeout=confirmations / 2)
        left = [*answering.suspects, *(hand for _, hand in answering.held)]
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
