"""The worker: takes batches, has them answered, publishes verdicts, acknowledges, drains."""

import os
import secrets
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import structlog

from services.broker import BrokerAddress, Consumer, Delivery, Outgoing, Publisher
from services.contracts import ClaimBatch, ContextSpec, Settings, decode, encode, topology
from services.contracts.errors import (
    BrokerUnreachable,
    EngineRequestError,
    EngineStartError,
    MessageInvalid,
)
from services.gpu_worker.device import Device
from services.gpu_worker.engine import Engine
from services.gpu_worker.inference import Inference, Outcome
from services.gpu_worker.tokenizer import ModelTokenizer

_TAKE_SECONDS = 0.2
_MOST_FAILED_STARTS = 3
_LONGEST_PAUSE_SECONDS = 30.0

log = structlog.get_logger(__name__)


class _Job:
    """A batch in hand. Exactly one of its two ends comes first: finished, or abandoned."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self._first = threading.Lock()

    def ends(self) -> bool:
        """True for the one caller that may settle the delivery."""
        return self._first.acquire(blocking=False)


class Worker:
    """Serves one context on one device until it is told to stop.

    Threads: the caller's takes batches and minds the engine; `batches_in_flight` pool threads each
    see one batch through, so that the engine's continuous batching stays full; each link to the
    broker has its own. A batch is acknowledged after the broker has confirmed its verdicts.
    """

    def __init__(self, spec: ContextSpec, device: Device, settings: Settings) -> None:
        """Raises ModelError or UsageError before anything is started."""
        self._spec = spec
        self._settings = settings
        self._tokenizer = ModelTokenizer.load(spec)
        self._engine = Engine(spec, device, settings)
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._inference = Inference(
            self._tokenizer,
            self._engine.client,
            max_model_tokens=spec.max_model_tokens,
            worker_id=self.worker_id,
            device_name=device.name,
        )
        self._stop = threading.Event()
        self._failures = 0

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
        context_ids = (self._spec.context_id,)
        log.info("worker.starting", worker=self.worker_id, context=self._spec.context_id)
        try:
            with Publisher(
                address,
                "worker-verdicts",
                window=self._settings.publish_window,
                context_ids=context_ids,
            ).open(timeout) as publisher:
                # Claims are taken only once there is an engine for them. An engine that never ran
                # here is misconfigured: that is said now, not after several tries.
                if not self._start_engine(attempts=1):
                    return
                with Consumer(
                    address,
                    "worker-claims",
                    queues=[topology.claims_queue(self._spec.context_id)],
                    prefetch=self._settings.batches_in_flight,
                    context_ids=context_ids,
                ).open(timeout) as consumer:
                    self._serve(consumer, publisher)
        finally:
            self._engine.close()
            log.info("worker.stopped", worker=self.worker_id)

    def _start_engine(self, attempts: int) -> bool:
        """Start it, again with growing pauses if need be. False when told to stop meanwhile."""
        for attempt in range(1, attempts + 1):
            try:
                return self._engine.start(self._stop)
            except EngineStartError as error:
                if attempt == attempts:
                    raise
                pause = min(_LONGEST_PAUSE_SECONDS, 2.0**attempt)
                log.error("engine.start_failed", error=str(error), again_in_seconds=pause)
                if self._stop.wait(pause):
                    return False
        return False

    def _serve(self, consumer: Consumer, publisher: Publisher) -> None:
        jobs: dict[Future[None], _Job] = {}
        pool = ThreadPoolExecutor(self._settings.batches_in_flight, thread_name_prefix="batch")
        log.info("worker.taking", worker=self.worker_id)
        try:
            while not self._stop.is_set():
                if not self._engine.alive:
                    log.error("engine.died", log=str(self._engine.log_file))
                    if not self._start_engine(attempts=_MOST_FAILED_STARTS):
                        break
                delivery = consumer.take(_TAKE_SECONDS)
                for done in [future for future in jobs if future.done()]:
                    del jobs[done]
                    done.result()  # a bug in a job ends the worker, loudly
                if delivery is not None:
                    job = _Job(delivery)
                    jobs[pool.submit(self._see_through, job, consumer, publisher)] = job
        finally:
            self._drain(jobs, consumer, publisher)
            pool.shutdown(wait=False, cancel_futures=True)

    def _see_through(self, job: _Job, consumer: Consumer, publisher: Publisher) -> None:
        delivery = job.delivery
        try:
            batch = decode(ClaimBatch, delivery.body)
            if batch.run.context.context_id != self._spec.context_id:
                raise MessageInvalid("the batch wants another context than its queue's")
            outcome = self._inference.infer(batch, delivery.attempt)
        except MessageInvalid as error:
            log.error("batch.refused", reason=str(error), message_id=delivery.message_id)
            if job.ends():
                consumer.refuse([delivery])
            return
        except EngineRequestError as error:
            self._failures += 1
            pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2 ** min(self._failures, 10))
            log.warning("batch.returned", reason=str(error), after_seconds=pause)
            self._stop.wait(pause)
            if job.ends():
                consumer.give_back([delivery])
            return
        self._failures = 0
        if job.ends():
            self._publish(batch, outcome, delivery, consumer, publisher)

    def _publish(
        self,
        batch: ClaimBatch,
        outcome: Outcome,
        delivery: Delivery,
        consumer: Consumer,
        publisher: Publisher,
    ) -> None:
        messages = [
            (topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE, encode(dead))
            for dead in outcome.dead
        ]
        if outcome.verdicts is not None:
            messages.append(
                (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE, encode(outcome.verdicts))
            )
        unconfirmed = len(messages)

        def confirmed() -> None:  # on the publisher's thread, one at a time
            nonlocal unconfirmed
            unconfirmed -= 1
            if unconfirmed == 0:
                consumer.acknowledge([delivery])

        for number, (exchange, routing_key, body) in enumerate(messages):
            publisher.publish(
                Outgoing(
                    exchange,
                    routing_key,
                    body,
                    message_id=f"{batch.run.run_id}/{batch.batch_id}/{delivery.attempt}/{number}",
                    on_confirmed=confirmed,
                )
            )
        log.debug("batch.done", batch=batch.batch_id, claims=len(batch.claims))

    def _drain(
        self, jobs: dict[Future[None], _Job], consumer: Consumer, publisher: Publisher
    ) -> None:
        """Finish what can be finished in the grace period; give the rest back."""
        # The other half is for the confirmations and for the engine's own end.
        deadline = time.monotonic() + 0.5 * self._settings.grace_seconds
        log.info("worker.draining", batches_in_hand=len(jobs))
        consumer.stop_taking(timeout_seconds=2.0)
        if self._engine.alive:
            wait(jobs, timeout=max(0.0, deadline - time.monotonic()))
        abandoned = [job.delivery for job in jobs.values() if job.ends()]
        consumer.give_back(abandoned)
        try:
            publisher.flush(timeout_seconds=0.15 * self._settings.grace_seconds)
        except BrokerUnreachable as error:
            # Their batches were not acknowledged: someone else will answer them again.
            log.warning("verdicts.unconfirmed", reason=str(error))
        log.info("worker.drained", batches_returned=len(abandoned))
