"""The worker: who it is, which context it serves, and when it takes another."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

import structlog
from prometheus_client import REGISTRY

from services.broker import BrokerAddress, Consumer, Publisher
from services.contexts.accepted import refusal
from services.contexts.engine_client import CompletionClient
from services.contexts.metrics import ContextStates, EngineMetrics
from services.contexts.records import State
from services.contracts import ContextDemand, ContextSpec, Settings
from services.contracts.errors import BrokerUnreachable, EngineError, ModelError, UsageError
from services.contracts.heartbeats import Ending, unique_process_name
from services.gpu_worker.heartbeat import Post, WorkerStatus
from services.gpu_worker.in_flight import WorkerIdentity
from services.gpu_worker.scheduling import Situation, StartupEstimates, Switch, next_context
from services.gpu_worker.session import ContextSession, Shift
from services.models.files import pin_model
from services.node.device import Device

_LOOK_SECONDS = 0.2
_REPORT_SECONDS = 10.0

log = structlog.get_logger(__name__)


class Worker:
    """Serves one context on one device, or whatever is wanted most, until it is told to stop."""

    def __init__(
        self,
        spec: ContextSpec | None,
        device: Device,
        settings: Settings,
        metrics_address: str | None = None,
        *,
        log_progress: bool = False,
    ) -> None:
        """Without a `spec` it goes by the directory, and changes its context when that pays.
        `metrics_address` is where others find its metrics. `log_progress`: log how many claims are
        answered, several times a second.

        Raises ModelError or UsageError before anything is started.
        """
        self._device = device
        self._settings = settings
        self._signature = WorkerIdentity(unique_process_name(), device.name)
        self._shift = Shift.begin(
            self._signature,
            Post.of(settings, metrics_address),
            settings.runtime_dir,
            log_progress=log_progress,
        )
        self._stop, self._news = self._shift.stop, self._shift.news
        self._publisher: Publisher | None = None
        self._serving_now: ContextSession | None = None
        self._heard = 0
        self._next: ContextSpec | None = None
        self._refused: set[str] = set()
        self._reported = 0.0
        self._readiness: StartupEstimates | None = None
        self._only: ContextSession | None = None
        if spec is None:
            self._readiness = StartupEstimates(device, settings)
        else:
            self._only = self._serving(spec)

    def stop(self, why: Ending = "SIGTERM") -> None:
        """Begin to drain. Any thread may call it."""
        self._shift.reports.ending = self._shift.reports.ending or why
        self._stop.set()

    @property
    def liveness_error(self) -> str | None:
        """See `telemetry.server.Service`. To wait for a broker at the start, and to drain, may
        take long, and ends.
        """
        waits = self._publisher is None or self._stop.is_set()
        return None if waits else self._shift.pulse.liveness_error

    @property
    def readiness_error(self) -> str | None:
        if self._stop.is_set():
            return "it drains"
        if self._publisher is None:
            return "no connection to the broker"
        serving = self._serving_now
        return self._publisher.readiness_error or (
            "it waits for a context that is wanted" if serving is None else serving.readiness_error
        )

    def run(self) -> None:
        """Serve until `stop`, then drain within the grace period.

        Raises BrokerError when the broker cannot be used at the start, EngineStartError when the
        engine of its only context failed to start several times in a row; claims in hand are given
        back before.
        """
        only = self._only
        self._shift.crashes.catch_fatal_signals()
        log.info(
            "worker.starting",
            worker=self._signature.worker_id,
            context=None if only is None else only.spec.context_id,
        )
        try:
            with (
                Publisher(
                    BrokerAddress.from_settings(self._settings),
                    "worker-verdicts",
                    window=self._settings.publish_window,
                ).open(
                    self._settings.broker_connect_timeout_seconds, self._stop.is_set
                ) as publisher,
                self._present(publisher),
            ):
                if only is not None:
                    self._serve(only, publisher)
                elif self._readiness is not None:
                    self._serve_what_is_wanted(self._readiness, publisher)
        except BrokerUnreachable:
            if not self._stop.is_set():  # else nothing was begun, and it is well so
                raise
        finally:
            if only is not None:
                only.close()
            self._shift.crashes.close()
            log.info("worker.stopped", worker=self._signature.worker_id)

    @contextmanager
    def _present(self, publisher: Publisher) -> Iterator[None]:
        """Seen by others: in its metrics, and in its last report as one that is gone."""
        self._shift.pulse.beat()
        self._publisher = publisher
        told = (ContextStates(self._states), EngineMetrics(self._client))
        for collector in told:
            REGISTRY.register(collector)
        try:
            yield
        finally:
            reports = self._shift.reports
            reports.ending = reports.ending or "failure"
            reports.say("stopped", WorkerStatus(), publisher)
            for collector in told:
                REGISTRY.unregister(collector)

    def _states(self) -> Sequence[State]:
        serving = self._serving_now
        state = None if serving is None else serving.engine_state
        return () if state is None else (state,)

    def _client(self) -> CompletionClient | None:
        serving = self._serving_now
        return None if serving is None or serving.engine_state != "warm" else serving.client

    def _serve(self, serving: ContextSession, publisher: Publisher) -> None:
        self._serving_now = serving
        try:
            serving.run(publisher, partial(self._should_switch, serving))
        finally:
            self._serving_now = None

    def _serving(self, spec: ContextSpec) -> ContextSession:
        return ContextSession(spec, self._device, self._settings, self._shift)

    def _should_switch(self, serving: ContextSession) -> bool:
        """Thinks anew with every notice."""
        if self._news.number != self._heard:
            self._heard = self._news.number
            serving.tell_demand()
            if self._readiness is not None:
                if serving.claims_per_second is not None:
                    self._readiness.answered(serving.spec.context_id)
                idle_seconds = serving.idle_seconds
                self._next = self._choose(
                    self._readiness,
                    Situation(
                        here=serving.spec.context_id,
                        queue_empty=idle_seconds > _LOOK_SECONDS,
                        idle_seconds=idle_seconds,
                        since_ready_seconds=serving.ready_seconds,
                        claims_per_second=serving.claims_per_second,
                        warm=self._readiness.seconds(self._contexts()),
                        draw=random.random(),
                    ),
                )
        return self._next is not None

    def _serve_what_is_wanted(self, readiness: StartupEstimates, publisher: Publisher) -> None:
        while not self._stop.is_set():
            spec = self._next or self._first_context(readiness, publisher)
            self._next = None
            if spec is None:
                continue
            try:
                # A path that the producer knows must hold the same weights here.
                pinned = pin_model(spec, self._settings.cache_dir, self._watch_reading)
                with closing(self._serving(pinned)) as serving:
                    self._serve(serving, publisher)
            except (EngineError, UsageError) as error:
                if self._stop.is_set():
                    return
                # Another node may have what this one lacks; other contexts may work here.
                pause = readiness.failed(spec.context_id, error)
                log.error(
                    "context.unusable",
                    context=spec.context_id,
                    reason=str(error),
                    again_in_seconds=round(pause, 1),
                )

    def _first_context(
        self, readiness: StartupEstimates, publisher: Publisher
    ) -> ContextSpec | None:
        """Listen until there is one that is worth a start; None when told to stop."""
        log.info("worker.idle", worker=self._signature.worker_id)
        idle_since = time.monotonic()
        with Consumer(
            BrokerAddress.from_settings(self._settings),
            "worker-notices",
            queues=(),
            prefetch=1,
            on_fanout_message=self._news.hear,
            listener=self._signature.worker_id,
        ) as notices:
            notices.open_until_stopped(self._stop, self._idle)
            while not self._stop.wait(_LOOK_SECONDS):
                publisher.raise_if_dead()
                notices.raise_if_dead()
                self._idle()
                self._shift.reports.say("idle", WorkerStatus(), publisher)
                if self._news.number == self._heard:
                    continue
                self._heard = self._news.number
                situation = Situation(
                    here=None,
                    queue_empty=True,
                    idle_seconds=time.monotonic() - idle_since,
                    since_ready_seconds=0.0,
                    claims_per_second=None,
                    warm=readiness.seconds(self._contexts()),
                    draw=random.random(),
                )
                chosen = self._choose(readiness, situation)
                if chosen is not None:
                    return chosen
        return None

    def _idle(self) -> None:
        self._shift.pulse.beat()
        self._shift.device_time.lap("idle")

    def _watch_reading(self, done_bytes: int, total_bytes: int) -> None:
        """While weights are read to identify them. Raises ModelError when told to stop."""
        if self._stop.is_set():
            raise ModelError("stopped while reading weights")
        self._shift.pulse.beat()
        self._shift.device_time.lap("loading")
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            log.info("model.reading", done_bytes=done_bytes, total_bytes=total_bytes)

    def _contexts(self) -> Sequence[ContextSpec]:
        return [line.context for line in self._accepted()]

    def _accepted(self) -> Sequence[ContextDemand]:
        """What the directory has for this worker. What it has of its contexts comes from whoever
        may publish runs, who is not trusted with what runs on this node.
        """
        lines: list[ContextDemand] = []
        refused: set[str] = set()
        for line in self._news.contexts:
            reason = refusal(line.context, self._settings)
            if reason is None:
                lines.append(line)
                continue
            context_id = line.context.context_id
            refused.add(context_id)
            if context_id not in self._refused:
                log.warning("context.refused", context=context_id, reason=reason)
        self._refused = refused
        return lines

    def _choose(self, readiness: StartupEstimates, situation: Situation) -> ContextSpec | None:
        usable: Sequence[ContextDemand] = [
            line for line in self._accepted() if readiness.may_try(line.context.context_id)
        ]
        decision = next_context(usable, situation)
        log.debug("context.considered", reason=decision.reason)
        if not isinstance(decision, Switch):
            return None
        log.info("context.switching", to=decision.context.context_id, reason=decision.reason)
        return decision.context
