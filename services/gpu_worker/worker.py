"""The worker: takes batches, has them answered, publishes verdicts, acknowledges, drains."""

import os
import secrets
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import structlog

from services.broker import BrokerAddress, Consumer, Delivery, Publisher
from services.contexts.completions import Interrupted
from services.contexts.device import Device
from services.contexts.engine import Engine
from services.contracts import ContextSpec, Notice, Settings, decode, topology
from services.contracts.errors import BrokerUnreachable, MessageInvalid
from services.gpu_worker.examination import Examination
from services.gpu_worker.in_hand import BatchInHand, Signature
from services.gpu_worker.inference import Inference
from services.gpu_worker.pacing import Pace
from services.gpu_worker.tokenizer import ModelTokenizer

_TAKE_SECONDS = 0.2

log = structlog.get_logger(__name__)


class Worker:
    """Serves one context on one device until it is told to stop.

    Threads: the caller's takes batches and minds the engine; `batches_in_flight` pool threads each
    see one batch through, so that the engine's continuous batching stays full; each link to the
    broker has its own. A batch is acknowledged after the broker has confirmed all that became of
    it. One that an engine failed with is a suspect, and is examined while there is no other job.
    """

    def __init__(self, spec: ContextSpec, device: Device, settings: Settings) -> None:
        """Raises ModelError or UsageError before anything is started."""
        self._spec = spec
        self._settings = settings
        tokenizer = ModelTokenizer.load(spec)
        self._engine = Engine(spec, device, settings)
        self._inference = Inference(
            tokenizer, self._engine.client, max_model_tokens=spec.max_model_tokens
        )
        worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._signature = Signature(worker_id, device.name)
        self._stop = threading.Event()
        self._examination = Examination(self._engine, self._inference, settings, self._stop)
        self._cancelled: frozenset[str] = frozenset()
        self._suspects: list[BatchInHand] = []
        self._pace = Pace(settings.horizon_seconds, settings.batches_in_flight)

    def stop(self) -> None:
        """Begin to drain. Safe to call from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop`, then drain within the grace period.

        Raises BrokerError when the broker cannot be used at the start, EngineStartError when the
        engine failed to start several times in a row; claims in hand are given back before.
        """
        address = BrokerAddress.from_settings(self._settings)
        timeout = self._settings.broker_connect_timeout_seconds
        worker_id = self._signature.worker_id
        log.info("worker.starting", worker=worker_id, context=self._spec.context_id)
        try:
            with Publisher(address, "worker-verdicts", window=self._settings.publish_window).open(
                timeout
            ) as publisher:
                # Claims are taken only once there is an engine for them. An engine that never ran
                # here is misconfigured: that is said now, not after several tries.
                if not self._examination.start_engine(attempts=1):
                    return
                with Consumer(
                    address,
                    "worker-claims",
                    queues=[topology.claims_queue(self._spec.context_id)],
                    prefetch=self._pace.batches,
                    on_notice=self._hear,
                    listener=worker_id,
                ).open(timeout) as consumer:
                    self._serve(consumer, publisher)
        finally:
            self._engine.close()
            log.info("worker.stopped", worker=worker_id)

    def _hear(self, body: bytes) -> None:
        try:
            self._cancelled = frozenset(decode(Notice, body).cancelled)
        except MessageInvalid as error:
            log.warning("notice.refused", reason=str(error))

    def _serve(self, consumer: Consumer, publisher: Publisher) -> None:
        pool = ThreadPoolExecutor(self._settings.batches_in_flight, thread_name_prefix="batch")
        work: set[Future[None]] = set()
        log.info("worker.taking", worker=self._signature.worker_id)
        try:
            while not self._stop.is_set():
                _raise_bugs(work)
                if self._suspects or not self._engine.alive:
                    if work:  # whoever asks a dead engine comes back at once
                        wait(work, timeout=_TAKE_SECONDS)
                        continue
                    if not self._engine_is_well():
                        break
                    if self._suspects:  # as the only job, so that nobody else is at the engine
                        work.add(pool.submit(self._examine, consumer, publisher))
                    continue
                delivery = consumer.take(_TAKE_SECONDS)
                if delivery is not None:
                    work.add(pool.submit(self._see_through, delivery, consumer, publisher))
        finally:
            self._drain(pool, work, consumer, publisher)
            pool.shutdown(wait=False, cancel_futures=True)

    def _see_through(self, delivery: Delivery, consumer: Consumer, publisher: Publisher) -> None:
        """On a pool thread: from a delivery to its settlement, or to the suspects."""
        try:
            hand = BatchInHand(delivery)
            run = hand.batch.run
            if run.context.context_id != self._spec.context_id:
                raise MessageInvalid("the batch wants another context than its queue's")
        except MessageInvalid as error:
            log.error("batch.refused", reason=str(error), message_id=delivery.message_id)
            publisher.publish(
                delivery.refused(str(error), lambda: consumer.acknowledge([delivery]))
            )
            return
        if hand.batch.submission_id in self._cancelled:
            log.info("batch.cancelled", run=run.run_id, claims=len(hand.open))
            consumer.acknowledge([delivery])
            return
        if hand.suspect:
            self._suspects.append(hand)
            return
        self._trim(hand, consumer, publisher)
        places = list(hand.open)
        begun = self._pace.begin()
        outcome = self._inference.infer(run.prompt, hand.claims(places))
        self._pace.end(begun, 0 if outcome.failure else len(outcome.verdicts))
        consumer.set_prefetch(self._pace.batches)
        hand.note(places, outcome)
        if hand.open and not isinstance(outcome.failure, Interrupted):
            log.warning("batch.failed", claims=len(hand.open), reason=str(outcome.failure))
            self._examination.note_failure(outcome.failure)
            hand.blame(places)
            self._suspects.append(hand)
            return
        hand.settle(consumer, publisher, self._signature)

    def _trim(self, hand: BatchInHand, consumer: Consumer, publisher: Publisher) -> None:
        """Keep what is finished within the horizon; someone faster may have the rest."""
        claims = len(hand.open)
        keep = self._pace.take(claims)
        consumer.set_prefetch(self._pace.batches)
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
        try:
            self._examination.examine(hand)
        finally:
            hand.settle(consumer, publisher, self._signature)

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
        consumer.stop_taking(timeout_seconds=2.0)
        if self._engine.alive:
            wait(work, timeout=max(0.0, deadline - time.monotonic()))
        # Each thread in the midst of a batch now publishes what was answered and returns the rest.
        self._engine.client.interrupt()
        confirmations = 0.15 * self._settings.grace_seconds
        wait(work, timeout=confirmations / 2)
        returned = [
            pool.submit(hand.settle, consumer, publisher, self._signature)
            for hand in self._suspects
        ]
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
