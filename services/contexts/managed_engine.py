"""One engine as its keeper manages it, from the first request for it until it has ended."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import structlog

from services.contexts.caches import EngineCaches, PastStart
from services.contexts.engine import Engine, start_error
from services.contexts.engine_command import needed_bytes
from services.contexts.engine_log import Explanation, ProcessExit, explanation
from services.contexts.eviction import Candidate
from services.contexts.fetching import fetch
from services.contexts.fork_server_client import ForkServer
from services.contexts.metrics import WRONG_ENGINES
from services.contexts.plan import EnginePlan
from services.contexts.protocol import ContextRecord, State
from services.contracts import ContextSpec, Settings
from services.contracts.clock import awake_seconds
from services.contracts.errors import (
    EngineRequestError,
    EngineStartError,
    KeepwarmError,
    ModelError,
)
from services.contracts.startup import StartupPhases
from services.models.files import (
    adapter_as_model,
    check_adapter_weights,
    is_local,
    weights_bytes,
)
from services.node.memory import available_bytes

_POLL_SECONDS = 0.1
# Putting an engine to sleep takes at most as long as a request may; stopping it takes less.
_END_SECONDS = 180.0
SOCKET_REMOVED = "its socket was removed"

# An engine on processors may be busy for seconds with the last requests of a worker that is gone,
# or while another engine starts on its node. These values allow two minutes (5 s for each answer).
_HANG_CHECK_SECONDS = 20.0
_HANG_FAILURES = 5

log = structlog.get_logger(__name__)


class _StartCancelled(Exception):
    """The engine was told to stop while it started."""


class EngineOwner(Protocol):
    """What a `ManagedEngine` needs of its keeper."""

    settings: Settings
    directory: Path
    caches: EngineCaches

    def fork_server_for(self, plan: EnginePlan) -> ForkServer: ...
    def reserve_memory(self, engine: "ManagedEngine") -> AbstractContextManager[bool]: ...
    def changed(self) -> None: ...
    def bound_caches(self) -> None: ...


class ManagedEngine:
    """Starts its engine on a thread of its own, watches it, and stops it on request, when it was
    idle for too long, or when its memory is needed.

    States: waiting (for its turn or for memory), starting, warm, asleep, stopping. After that it is
    `finished`.
    """

    def __init__(self, plan: EnginePlan, owner: EngineOwner, demand: int) -> None:
        """Raises UsageError when the path of its socket would be too long."""
        self.plan = plan
        self._owner = owner
        self._engine = Engine(plan, owner.directory)
        self._stop = threading.Event()
        self._stop_reason = "it was stopped"
        self._wake_up = threading.Event()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._model_directory = Path(plan.spec.model) if is_local(plan.spec.model) else None
        self._last_used = awake_seconds()
        self.contexts = frozenset({plan.spec.context_id})
        """The contexts that workers asked for: the plan's own, or one for each adapter."""
        self.ended_because: str | None = None
        """Why the engine ended, or did not start; None until then."""
        self.ran_out_of_memory = False
        """Whether it ended because memory ran out."""
        self.answers_changed = False
        """Whether its answers were found to differ from those at its start."""
        past = owner.caches.last_start(plan.name)
        self.known_bytes = past.memory_bytes if past else None
        self._start_seconds = past.restart_seconds if past else 0.0
        now = time.monotonic()
        self.record = ContextRecord(
            name=plan.name,
            context=plan.spec.base,
            device=plan.device.name,
            state="waiting",
            socket=str(self._engine.socket),
            log=str(self._engine.log_file),
            since=now,
            last_used=now,
            demand=demand,
        )
        self._thread = threading.Thread(target=self._run, name=plan.name, daemon=True)

    def start(self) -> None:
        """Start the thread that starts the engine."""
        self._thread.start()

    @property
    def finished(self) -> bool:
        return self.ended_because is not None

    @property
    def abandoned(self) -> bool:
        """Whether no worker waits for it: it is stopping, or asleep without a lease."""
        record = self.record
        return self._stop.is_set() or (record.state == "asleep" and not record.attached)

    # Leases. Each is a worker's connection.

    def attach(self) -> bool:
        """Count one more lease. False when the engine is stopping: then ask for a new one."""
        with self._lock:
            if self.record.state == "stopping" or self.finished:
                return False
            self._update_locked(attached=self.record.attached + 1, used=self.record.used + 1)
        self._wake_up.set()
        return True

    def detach(self) -> None:
        """Count one lease less. A start that lost its last lease is cancelled."""
        with self._lock:
            self._update_locked(attached=self.record.attached - 1)
            if not self.record.attached and self.record.state in ("waiting", "starting"):
                # Under the same lock, so that no worker attaches to a start that is cancelled.
                self._request_stop_locked("no worker waits for it any more")

    def load_adapter(self, spec: ContextSpec, stopped: Callable[[], bool] = lambda: False) -> None:
        """Load the adapter of this context, if it has one, into the warm engine. Returns without it
        when `stopped` becomes true while it is fetched.

        Raises EngineStartError when it cannot be fetched, or does not fit the model.
        """
        if spec.adapter is None:
            return
        try:
            directory = fetch(
                adapter_as_model(spec),
                self.plan.environment,
                lambda: self._stop.is_set() or stopped(),
            )
            if directory is None:
                return
            if not (is_local(spec.adapter) and is_local(spec.model)):  # else pin_model has done it
                check_adapter_weights(directory, self._model_directory)
            with self._loading:
                self._engine.load_adapter(spec.context_id, directory)
        except (EngineRequestError, ModelError) as error:
            raise EngineStartError(
                f"the adapter {spec.adapter} cannot be used with {spec.model}: {error}"
            ) from error
        with self._lock:
            self.contexts |= {spec.context_id}
            if spec.adapter not in self.record.adapters:
                self._update_locked(adapters=(*self.record.adapters, spec.adapter))

    def check(self) -> bool:
        """Whether the warm engine answers as it did when it was started. If not, it is stopped, for
        all workers that use it.
        """
        if self._engine.answers_as_at_start():
            return True
        if not self._stop.is_set():
            self.answers_changed = True
            WRONG_ENGINES.inc()
            log.error("context.wrong", context=self.plan.name, log=str(self._engine.log_file))
            self.stop("it does not answer as it did when it was started")
        return False

    def update_demand(self, claims: int) -> None:
        """Replace what is known of demand: how many claims wait for its contexts."""
        with self._lock:
            if claims != self.record.demand:
                self._update_locked(demand=claims)

    # Its end, and its sleep.

    def stop(self, why: str) -> None:
        """Begin to stop it, in use or not. Safe from any thread, and more than once."""
        with self._lock:
            self._request_stop_locked(why)

    def _request_stop_locked(self, why: str) -> None:
        """The caller holds the lock."""
        if not self._stop.is_set():
            log.info("context.stopping", context=self.plan.name, why=why)
            self._stop_reason = why
            self._stop.set()
            if not self.finished:
                self._update_locked(state="stopping")
        self._wake_up.set()

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait until the engine has ended."""
        self._thread.join(timeout_seconds)

    def candidate(self) -> Candidate | None:
        """What freeing its memory would cost and yield; None when it is in use, starting or
        stopping.
        """
        with self._lock:
            record = self.record
            if record.attached or record.state not in ("warm", "asleep"):
                return None
            return Candidate(
                name=record.name,
                memory_bytes=record.memory_bytes or 0,
                demand=record.demand,
                start_seconds=self._start_seconds,
                idle_seconds=time.monotonic() - record.last_used,
                asleep=record.state == "asleep",
            )

    def free_memory(self) -> None:
        """Free its memory, unless a worker has attached meanwhile. A warm engine is put to sleep if
        its device and the host's memory allow it; otherwise it is stopped.
        """
        with self._lock:
            if self.record.attached or self.record.state not in ("warm", "asleep"):
                return
            asleep = self.record.state == "asleep"
            self._update_locked(state="stopping")
        if not asleep and self._can_sleep():
            try:
                self._engine.sleep()
            except EngineRequestError as error:
                log.warning("context.sleep_failed", context=self.plan.name, reason=str(error))
            else:
                left = self._engine.memory_bytes()
                with self._lock:
                    if self._stop.is_set():
                        return  # it was told to stop meanwhile
                    self._update_locked(state="asleep", memory_bytes=left)
                log.info("context.asleep", context=self.plan.name)
                return
        self.stop("its memory is needed for another context")
        self.join(_END_SECONDS)

    def _can_sleep(self) -> bool:
        """Whether it is on CUDA, and the host has memory for what moves there: the weights, or all
        that the engine holds if their size is not known.
        """
        if self.plan.device.kind != "cuda" or self.plan.takes_adapters:
            return False
        moved_bytes = weights_bytes(self.plan.spec) or self.record.memory_bytes or 0
        return available_bytes() > moved_bytes

    # The engine's thread.

    def _run(self) -> None:
        why = "it was stopped"
        try:
            self._fetch_and_start()
            why = self._watch()
        except _StartCancelled:
            why = self._stop_reason
        except EngineStartError as error:
            cause = self._explain(self._engine.failed_start or ProcessExit())
            why = str(start_error(self.plan, self._engine.log_file, str(error), cause))
            log.error("context.failed", context=self.plan.name, reason=str(error))
        except (KeepwarmError, OSError, psutil.Error) as error:
            why = str(error)
            log.error("context.failed", context=self.plan.name, reason=why)
        finally:
            try:
                self._engine.stop()
            finally:  # others wait for its end, even if stopping it failed
                with self._lock:
                    self.ended_because = why
                self._owner.changed()
                log.info("context.ended", context=self.plan.name, why=why.partition("\n")[0])

    def _fetch_and_start(self) -> None:
        # The log of an earlier engine of this name explains nothing of this start.
        self._engine.log_file.unlink(missing_ok=True)
        started_at = time.monotonic()
        if not is_local(self.plan.spec.model):
            self._owner.fork_server_for(self.plan)  # its imports go on while the weights come
        fetch_seconds = self._fetch()
        # While memory is reserved nothing is fetched or waited for: it keeps others from starting.
        waiting_since = time.monotonic()
        deadline = awake_seconds() + self._owner.settings.engine_start_timeout_seconds
        while True:
            self._wait_for_other_keepers(deadline)
            with self._reserve_memory(), self._owner.caches.starting(self.plan.name) as cache:
                if cache is not None:
                    # The wait for its turn is not part of a start's duration.
                    started_at += time.monotonic() - waiting_since
                    phases = self._start_engine(cache, started_at, fetch_seconds)
                    break
        memory = self._engine.memory_bytes()
        past = PastStart(phases=phases, memory_bytes=memory)
        self._start_seconds = past.restart_seconds
        self._owner.caches.save_start(self.plan.name, past)
        pid, held = self._engine.pid, memory or self._estimated_bytes()
        with self._lock:
            self._update_locked(
                state="stopping" if self._stop.is_set() else "warm",
                progress="",
                pid=pid,
                pid_started=psutil.Process(pid).create_time() if pid else None,
                memory_bytes=held,
                phases=phases,
            )
        log.info("context.warm", context=self.plan.name, **phases.model_dump())
        try:
            self._owner.bound_caches()
        except OSError as error:  # another node with the same home directory may do it now
            log.warning("caches.not_bounded", reason=str(error))

    def _start_engine(
        self, cache: Path, started_at: float, fetch_seconds: float | None
    ) -> StartupPhases:
        self._set_state("starting", progress="")
        log.info("context.starting", context=self.plan.name, log=str(self._engine.log_file))
        phases = self._engine.start(
            self._owner.fork_server_for(self.plan),
            cache,
            self._stop,
            self._owner.settings.engine_start_timeout_seconds,
            loading=lambda progress: self._update(progress=progress),
            started_at=started_at,
        )
        if phases is None:
            raise _StartCancelled  # the cache keeps its mark: what is in it may be incomplete
        return phases.model_copy(update={"fetch": fetch_seconds})

    def _estimated_bytes(self) -> int:
        """What it holds where that cannot be measured (in a container NVML may not know our
        processes). An engine that seemed to hold nothing would never be chosen to free memory.
        """
        return needed_bytes(self.plan, self.known_bytes)

    @contextmanager
    def _reserve_memory(self) -> Iterator[None]:
        with self._owner.reserve_memory(self) as reserved:
            if not reserved or self._stop.is_set():
                raise _StartCancelled
            yield

    def _wait_for_other_keepers(self, deadline: float) -> None:
        """Wait while another keeper of this user starts the same engine with the same caches: one
        on this node with another runtime directory, or on another node with a shared file system.

        Raises EngineStartError when that takes too long.
        """
        caches, name = self._owner.caches, self.plan.name
        while caches.is_starting(name):
            self.report_progress("waiting for another keeper that starts the same engine")
            if self._stop.wait(_POLL_SECONDS):
                raise _StartCancelled
            if awake_seconds() > deadline:
                limit = self._owner.settings.engine_start_timeout_seconds
                raise EngineStartError(
                    f"another keeper of this user starts the same engine, and has held "
                    f"{caches.lock_path(name)} for {limit:g} s "
                    "(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS). End that keeper, or give this one a "
                    "KEEPWARM_CACHE_DIR of its own"
                )

    def _fetch(self) -> float | None:
        """Fetch the weights to the node. Returns seconds, None where the model is a directory.

        Raises ModelError.
        """
        if is_local(self.plan.spec.model):
            return None
        started = time.monotonic()
        self.report_progress("fetching weights")
        directory = fetch(self.plan.spec, self.plan.environment, self._stop.is_set)
        if directory is None:
            raise _StartCancelled
        self._model_directory = directory
        self.report_progress("")
        return round(time.monotonic() - started, 3)

    def _watch(self) -> str:
        """Watch the warm engine until it has ended or has to stop. Returns why."""
        idle_seconds = self._owner.settings.context_idle_seconds
        hang_detector = HangDetector(self._engine.healthy)
        while not self._stop.is_set():
            if not self._engine.alive:
                return self._describe_end()
            if not self._engine.socket.exists():
                return self._stop_reason if self._stop.is_set() else SOCKET_REMOVED
            record = self.record
            if record.attached and record.state == "asleep":
                self._wake()
            elif not record.attached and awake_seconds() - self._last_used > idle_seconds:
                self._stop_unused(f"no worker used it for {idle_seconds:g} s")
                continue
            if record.attached or record.state != "warm":
                hang_detector.reset()
            elif hang_detector.is_hung:
                self._stop_unused("it hangs: it does not answer any more")
            self._wake_up.wait(_POLL_SECONDS)
            self._wake_up.clear()
        return self._stop_reason

    def _describe_end(self) -> str:
        process_exit = self._engine.process_exit()
        cause = self._explain(process_exit).text
        return f"it ended (exit code {process_exit.exit_code})" + (f". {cause}" if cause else "")

    def _explain(self, process_exit: ProcessExit) -> Explanation:
        cause = explanation(self._engine.log_file, process_exit, self.plan.device.name)
        self.ran_out_of_memory = cause.out_of_memory
        return cause

    def _stop_unused(self, why: str) -> None:
        with self._lock:
            if not self.record.attached:
                self._request_stop_locked(why)

    def _wake(self) -> None:
        with self._owner.reserve_memory(self) as reserved:
            if not reserved:
                self._update(progress="")  # it stays asleep
                return
            try:
                self._engine.wake()
            except EngineRequestError as error:
                raise EngineStartError(f"it did not wake up: {error}") from error
            if not self.check():
                return
            memory = self._engine.memory_bytes() or self._estimated_bytes()
            self._set_state("warm", memory_bytes=memory)
        log.info("context.awake", context=self.plan.name)

    # Its record, which others read.

    def _set_state(self, state: State, **more: object) -> None:
        with self._lock:
            if self.record.state != "stopping":
                self._update_locked(state=state, **more)

    def report_progress(self, progress: str) -> None:
        """Show the workers that wait for it what it waits for."""
        if progress != self.record.progress:
            self._update(progress=progress)

    def _update(self, **changes: object) -> None:
        with self._lock:
            self._update_locked(**changes)

    def _update_locked(self, **changes: object) -> None:
        """Change the record. The caller holds the lock. A changed number of leases counts as use of
        the context.
        """
        if "attached" in changes:
            changes["last_used"], self._last_used = time.monotonic(), awake_seconds()
        self.record = self.record.model_copy(update=changes)
        self._owner.changed()


class HangDetector:
    """Asks an idle engine from time to time whether it answers, and counts failures in a row.

    Workers have a time-out of their own for an engine that they use. Without this check an engine
    that hangs while it is idle would be leased to the next worker as warm.
    """

    def __init__(
        self, answers: Callable[[], bool], clock: Callable[[], float] = awake_seconds
    ) -> None:
        self._answers = answers
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Forget earlier failures, because the engine is in use or asleep."""
        self._unanswered = 0
        self._again_at = self._clock() + _HANG_CHECK_SECONDS

    @property
    def is_hung(self) -> bool:
        """Whether the engine failed to answer several times in a row. When the next check is due
        this asks the engine, and waits for its answer.
        """
        if self._clock() >= self._again_at:
            self._unanswered = 0 if self._answers() else self._unanswered + 1
            self._again_at = self._clock() + _HANG_CHECK_SECONDS
        return self._unanswered >= _HANG_FAILURES
