"""The worker: its identity, the context that it serves, and when it switches to another."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import structlog
from prometheus_client import REGISTRY

from services.broker import BrokerAddress, Consumer, Publisher
from services.contexts.accepted_contexts import refusal
from services.contexts.engine_client import EngineClient
from services.contexts.metrics import ContextStates, EngineMetrics
from services.contexts.protocol import State
from services.contracts import ContextDemand, ContextSpec, Settings
from services.contracts.errors import BrokerUnreachable, EngineError, ModelError, UsageError
from services.contracts.heartbeats import Ending, unique_process_name
from services.gpu_worker.crashes import CrashRecords
from services.gpu_worker.device_time import DeviceTime
from services.gpu_worker.heartbeat import ControlState, HeartbeatSender, WorkerPlacement
from services.gpu_worker.in_flight import WorkerIdentity
from services.gpu_worker.scheduling import Situation, StartupEstimates, Switch, next_context
from services.gpu_worker.session import ContextSession
from services.models.files import pin_model
from services.node.device import Device
from services.node.runtime_dir import open_runtime_dir
from services.telemetry import TimedLock, Watchdog

_IDLE_CHECK_SECONDS = 0.2
_PROGRESS_LOG_SECONDS = 10.0

log = structlog.get_logger(__name__)


class Worker:
    """Serves one context on one device, or that with most demand, until it is told to stop."""

    def __init__(
        self,
        spec: ContextSpec | None,
        device: Device,
        settings: Settings,
        metrics_address: str | None = None,
        *,
        watched_as: str | None = None,
    ) -> None:
        """Without a `spec` it follows the demand, and switches contexts when that pays.
        `metrics_address` is where Prometheus finds its metrics. `watched_as`: its id, by which a
        `keepwarm run` follows its heartbeats; they then report each progress.

        Raises ModelError or UsageError before anything is started.
        """
        self._device = device
        self._settings = settings
        self._identity = WorkerIdentity(watched_as or unique_process_name(), device.name)
        self._stop = threading.Event()
        self._control = ControlState()
        self._heartbeats = HeartbeatSender(
            self._identity,
            WorkerPlacement.detect(settings, metrics_address),
            watched=watched_as is not None,
        )
        self._watchdog = Watchdog()
        self._tokenizing = TimedLock()
        self._device_time = DeviceTime(device.name)
        self._crashes = CrashRecords(
            open_runtime_dir(settings.runtime_dir), self._identity.worker_id
        )
        self._publisher: Publisher | None = None
        self._session: ContextSession | None = None
        self._updates_seen = 0
        self._refused: set[str] = set()
        self._progress_logged_at = 0.0
        self._estimates: StartupEstimates | None = None
        self._fixed_session: ContextSession | None = None
        if spec is None:
            self._estimates = StartupEstimates(device, settings)
        else:
            self._fixed_session = self._open_session(spec)

    def stop(self, why: Ending = "SIGTERM") -> None:
        """Begin to drain. Any thread may call it."""
        self._heartbeats.ending = self._heartbeats.ending or why
        self._stop.set()

    @property
    def liveness_error(self) -> str | None:
        """See `metrics_server.Service`. Waiting for a broker at the start and draining may take
        long, and have deadlines of their own.
        """
        bounded = self._publisher is None or self._stop.is_set()
        return None if bounded else self._watchdog.liveness_error

    @property
    def tokenizer_hangs(self) -> bool:
        """After `run`: whether a thread is still tokenizing. This process would wait for it."""
        return self._tokenizing.held_seconds > 0

    @property
    def readiness_error(self) -> str | None:
        if self._stop.is_set():
            return "it is draining"
        if self._publisher is None:
            return "no connection to the broker"
        session = self._session
        return self._publisher.readiness_error or (
            "it waits for a context that is wanted" if session is None else session.readiness_error
        )

    def run(self) -> None:
        """Serve until `stop`, then drain within the grace period.

        Raises BrokerError when the broker cannot be used at the start, EngineStartError when the
        engine of its only context failed to start several times in a row; claims in flight are
        returned before.
        """
        session = self._fixed_session
        self._crashes.catch_fatal_signals()
        log.info(
            "worker.starting",
            worker=self._identity.worker_id,
            context=None if session is None else session.spec.context_id,
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
                self._registered(publisher),
            ):
                if session is not None:
                    self._serve(session, publisher)
                elif self._estimates is not None:
                    self._serve_by_demand(self._estimates, publisher)
        except BrokerUnreachable:
            if not self._stop.is_set():  # else it was stopped before it began
                raise
        finally:
            if session is not None:
                session.close()
            self._crashes.close()
            log.info("worker.stopped", worker=self._identity.worker_id)

    @contextmanager
    def _registered(self, publisher: Publisher) -> Iterator[None]:
        """Register its metrics; at the end, send the last heartbeat."""
        self._watchdog.beat()
        self._publisher = publisher
        collectors = (ContextStates(self._states), EngineMetrics(self._client))
        for collector in collectors:
            REGISTRY.register(collector)
        try:
            yield
        finally:
            self._heartbeats.ending = self._heartbeats.ending or "failure"
            self._heartbeats.send_if_due("stopped", publisher)
            for collector in collectors:
                REGISTRY.unregister(collector)

    def _states(self) -> Sequence[State]:
        session = self._session
        state = None if session is None else session.engine_state
        return () if state is None else (state,)

    def _client(self) -> EngineClient | None:
        session = self._session
        return None if session is None or session.engine_state != "warm" else session.client

    def _open_session(self, spec: ContextSpec) -> ContextSession:
        return ContextSession(
            spec,
            self._device,
            self._settings,
            identity=self._identity,
            stop=self._stop,
            control=self._control,
            heartbeats=self._heartbeats,
            watchdog=self._watchdog,
            tokenizing=self._tokenizing,
            device_time=self._device_time,
            crashes=self._crashes,
        )

    def _serve(self, session: ContextSession, publisher: Publisher) -> ContextSpec | None:
        """Serve a context; the one to serve next, None after `stop`."""
        self._session = session
        try:
            return session.run(publisher, lambda: self._choose_next(session))
        finally:
            self._session = None

    def _choose_next(self, session: ContextSession) -> ContextSpec | None:
        """The context to switch to; None to stay. Decides once for each control update."""
        if self._control.update_count == self._updates_seen:
            return None
        self._updates_seen = self._control.update_count
        session.pass_demand_to_keeper()
        if self._estimates is None:
            return None
        if session.claims_per_second is not None:
            self._estimates.answered(session.spec.context_id)
        idle_seconds = session.idle_seconds
        here = session.spec.context_id
        others = [spec for spec in self._accepted_contexts() if spec.context_id != here]
        return self._choose(
            self._estimates,
            Situation(
                here=here,
                queue_empty=idle_seconds > _IDLE_CHECK_SECONDS,
                idle_seconds=idle_seconds,
                since_ready_seconds=session.ready_seconds,
                claims_per_second=session.claims_per_second,
                start_seconds=self._estimates.seconds(others),
                random_draw=random.random(),
            ),
        )

    def _serve_by_demand(self, estimates: StartupEstimates, publisher: Publisher) -> None:
        next_spec: ContextSpec | None = None
        while not self._stop.is_set():
            spec = next_spec or self._first_context(estimates, publisher)
            next_spec = None
            if spec is None:
                continue
            try:
                # A path from a message must hold the same weights on this node.
                pinned = pin_model(spec, self._settings.cache_dir, self._on_reading)
                with closing(self._open_session(pinned)) as session:
                    next_spec = self._serve(session, publisher)
            except (EngineError, UsageError) as error:
                if self._stop.is_set():
                    return
                # Another node may be able to serve it, and this node may serve other contexts.
                pause = estimates.failed(spec.context_id, error)
                log.error(
                    "context.unusable",
                    context=spec.context_id,
                    reason=str(error),
                    again_in_seconds=round(pause, 1),
                )

    def _first_context(
        self, estimates: StartupEstimates, publisher: Publisher
    ) -> ContextSpec | None:
        """Wait for a context that is worth a start; None when told to stop."""
        log.info("worker.idle", worker=self._identity.worker_id)
        idle_since = time.monotonic()
        with Consumer(
            BrokerAddress.from_settings(self._settings),
            "worker-notices",
            queues=(),
            prefetch=1,
            on_fanout_message=self._control.receive,
            listener=self._identity.worker_id,
        ) as updates:
            updates.open_until_stopped(self._stop, self._idle)
            while not self._stop.wait(_IDLE_CHECK_SECONDS):
                publisher.raise_if_dead()
                updates.raise_if_dead()
                self._idle()
                self._heartbeats.send_if_due("idle", publisher)
                if self._control.update_count == self._updates_seen:
                    continue
                self._updates_seen = self._control.update_count
                situation = Situation(
                    here=None,
                    queue_empty=True,
                    idle_seconds=time.monotonic() - idle_since,
                    since_ready_seconds=0.0,
                    claims_per_second=None,
                    start_seconds=estimates.seconds(self._accepted_contexts()),
                    random_draw=random.random(),
                )
                chosen = self._choose(estimates, situation)
                if chosen is not None:
                    return chosen
        return None

    def _idle(self) -> None:
        self._watchdog.beat()
        self._device_time.lap("idle")

    def _on_reading(self, done_bytes: int, total_bytes: int) -> None:
        """Called while weights are read to identify them. Raises ModelError when told to stop."""
        if self._stop.is_set():
            raise ModelError("stopped while reading weights")
        self._watchdog.beat()
        self._device_time.lap("loading")
        if time.monotonic() - self._progress_logged_at >= _PROGRESS_LOG_SECONDS:
            self._progress_logged_at = time.monotonic()
            log.info("model.reading", done_bytes=done_bytes, total_bytes=total_bytes)

    def _accepted_contexts(self) -> Sequence[ContextSpec]:
        return [entry.context for entry in self._accepted_demand()]

    def _accepted_demand(self) -> Sequence[ContextDemand]:
        """The demand for contexts that may run on this node. Their specs come from producers, which
        are not trusted with what runs here.
        """
        accepted: list[ContextDemand] = []
        refused: set[str] = set()
        for entry in self._control.demand:
            reason = refusal(entry.context, self._settings)
            if reason is None:
                accepted.append(entry)
                continue
            context_id = entry.context.context_id
            refused.add(context_id)
            if context_id not in self._refused:
                log.warning("context.refused", context=context_id, reason=reason)
        self._refused = refused
        return accepted

    def _choose(self, estimates: StartupEstimates, situation: Situation) -> ContextSpec | None:
        accepted = self._accepted_demand()
        usable = [entry for entry in accepted if estimates.may_try(entry.context.context_id)]
        decision = next_context(usable, situation)
        log.debug("context.considered", reason=decision.reason)
        if not isinstance(decision, Switch):
            return None
        log.info("context.switching", to=decision.context.context_id, reason=decision.reason)
        return decision.context
