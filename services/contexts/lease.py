"""A worker's lease on an engine of its node."""

import contextlib
import select
import threading
import time
from collections.abc import Callable

import structlog

from services.contexts.engine import start_error
from services.contexts.engine_client import EngineClient
from services.contexts.engine_log import OOM, ProcessExit, explanation
from services.contexts.keeper_client import check_keeper, evict, open_keeper
from services.contexts.metrics import ATTACHES
from services.contexts.plan import EnginePlan
from services.contexts.protocol import (
    Attach,
    ContextRecord,
    Demand,
    KeeperChannel,
    KeeperReply,
    State,
)
from services.contracts import Settings
from services.contracts.clock import awake_seconds
from services.contracts.errors import EngineStartError, KeeperError
from services.contracts.heartbeats import RestartReason
from services.contracts.startup import StartupPhases
from services.node.memory import oom_kills
from services.node.runtime_dir import log_tail, open_runtime_dir, socket_path

_POLL_SECONDS = 0.1
_ENGINE_CHECK_SECONDS = 3.0
_PROGRESS_LOG_SECONDS = 5.0
# A keeper reports once a second how a start proceeds, and nothing while the start waits its turn.
_KEEPER_SILENCE_SECONDS = 60.0

log = structlog.get_logger(__name__)


class EngineLease:
    """A worker's lease on its engine. The keeper starts and stops the engine, and keeps it during
    the lease. The lease is a connection, so it ends when the worker dies.

    After the engine has ended, `start` asks for a new one. `stop` may be called from any thread.
    """

    def __init__(
        self,
        plan: EnginePlan,
        settings: Settings,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` calls `while_waiting` several times a second while it waits.

        Raises UsageError for a runtime directory that is unusable.
        """
        self.plan = plan
        self._while_waiting = while_waiting
        self._settings = settings
        self._directory = open_runtime_dir(settings.runtime_dir)
        self._channel: KeeperChannel | None = None
        self._record: ContextRecord | None = None
        self.ended_because: str | None = None
        """Why the engine ended, as reported by its keeper; None while it is warm."""
        self.ran_out_of_memory = False
        """Whether it, or its keeper, ended because memory ran out; False while it is warm."""
        self._stopped: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._last_reply_at = awake_seconds()
        self._oom_kills = oom_kills()
        self.starts = 0
        """How often `start` has succeeded."""
        self.warm = False
        """Whether the engine was warm already when the worker attached."""
        self.seconds = 0.0
        """The duration of the last `start`, until the engine was warm."""
        self.max_model_tokens: int | None = None
        """The most tokens that the engine takes, as it reports. Fewer than its context has if the
        operator's arguments set a smaller limit.
        """
        self.log_file = self._directory / f"{plan.name}.log"
        self.client = EngineClient(
            socket_path(self._directory, plan.name),
            plan.spec.context_id,
            settings.engine_request_timeout_seconds,
        )

    @property
    def phases(self) -> StartupPhases | None:
        """The phases of the engine's start; None unless it was started for this lease."""
        return None if self._record is None else self._record.phases

    @property
    def state(self) -> State | None:
        """The state last reported; None without an engine. Unlike `alive` this reads no replies."""
        record = self._record
        return None if record is None else record.state

    @property
    def restart_reason(self) -> RestartReason | None:
        """Why the engine starts again; None while it is warm, and before its first start."""
        if self.starts == 0 or self.state == "warm":
            return None
        return "out-of-memory" if self.ran_out_of_memory else "engine-ended"

    @property
    def alive(self) -> bool:
        """Whether the engine is warm, by its keeper's latest reply. Waits neither for a reply nor
        for a start in another thread.
        """
        with self._lock:
            self._read_replies()
            return self.state == "warm"

    def check(self) -> None:
        """After a failed request: wait up to three seconds for the keeper to report the engine's
        end, unless the engine answers.
        """
        deadline = time.monotonic() + _ENGINE_CHECK_SECONDS
        while self.alive and not self.client.healthy() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def start(self, stop: threading.Event) -> bool:
        """Lease the engine and wait until it is warm. False when `stop` was set meanwhile.

        Raises EngineStartError, with the end of the engine's log, when it does not start;
        KeeperError when there is no keeper and none can be started.
        """
        started = reported = time.monotonic()
        log.info("engine.starting", context=self.plan.spec.context_id, log=str(self.log_file))
        self._release()
        self._stopped = stop.is_set
        self._oom_kills = oom_kills()
        channel = open_keeper(self._settings, stop.is_set)
        if channel is None:
            return False
        with self._lock:
            self._channel, self._last_reply_at = channel, awake_seconds()
            channel.send(Attach(plan=self.plan))
        while not self.alive:
            if stop.is_set():
                break
            if self._channel is None:
                ATTACHES.labels("failed").inc()
                raise EngineStartError(self.ended_because or "its keeper ended")
            if awake_seconds() - self._last_reply_at > _KEEPER_SILENCE_SECONDS:
                self._check_keeper()
            with contextlib.suppress(OSError, ValueError):  # another thread has closed it
                select.select([channel], [], [], _POLL_SECONDS)
            self._while_waiting()
            now = time.monotonic()
            record = self._record
            if record is not None and now - reported >= _PROGRESS_LOG_SECONDS:
                reported = now
                log.info(
                    "engine.loading",
                    seconds=round(now - started),
                    state=record.state,
                    progress=record.progress,
                )
        if stop.is_set():
            self._release()
            return False
        self.starts += 1
        started_for_us = self.phases is not None
        ATTACHES.labels("warm" if self.warm else "cold" if started_for_us else "joined").inc()
        self.seconds = time.monotonic() - started
        self.max_model_tokens = self.client.max_model_tokens()
        log.info(
            "engine.ready",
            seconds=round(self.seconds, 2),
            warm=self.warm,
            phases=None if self.phases is None else self.phases.model_dump(),
        )
        wanted = self.plan.spec.max_model_tokens
        if self.max_model_tokens is not None and self.max_model_tokens < wanted:
            log.warning(
                "engine.shorter_than_context",
                takes_tokens=self.max_model_tokens,
                context_tokens=wanted,
                next_step="longer claims are left to other engines; remove --max-model-len from "
                "KEEPWARM_ENGINE_ARGUMENTS on this node, or use --max-model-tokens",
            )
        return True

    def stop(self) -> None:
        """Stop the engine because it hangs, for all workers that use it."""
        try:
            evict(self._settings, (self.plan.name,), self._stopped)
        except KeeperError as error:  # the next `start` reports what is wrong with the keeper
            log.warning("engine.not_evicted", reason=str(error))
        self._release()

    def close(self) -> None:
        """Give the lease back. The engine stays warm for the next worker."""
        self._release()

    def send_demand(self, claims: dict[str, int]) -> None:
        """Report how many claims wait for each context: the keeper uses it to choose whose memory
        to free.
        """
        with self._lock:
            if self._channel is not None:
                with contextlib.suppress(KeeperError):  # if it is gone, `alive` finds out
                    self._channel.send(Demand(claims=claims))

    def log_tail(self) -> list[str]:
        """The end of the engine's log, without empty lines."""
        return log_tail(self.log_file)

    def start_error(self, what: str) -> EngineStartError:
        """The error to raise when the engine cannot be used, with the end of its log."""
        why = explanation(self.log_file, ProcessExit(), self.plan.device.name)
        return start_error(self.plan, self.log_file, what, why)

    def _read_replies(self) -> None:
        """Read the keeper's replies that have arrived. The caller holds the lock."""
        while self._channel is not None:
            try:
                reply = self._channel.reply(0) or self._keeper_ended()
            except TimeoutError:
                return
            self._last_reply_at = awake_seconds()
            if reply.error is not None:
                self.ended_because, self.ran_out_of_memory = reply.error, reply.out_of_memory
                self._channel.close()
                self._channel = self._record = None
            elif reply.record is not None:
                self._record, self.warm = reply.record, reply.warm
                if reply.record.state == "warm":
                    self.ended_because, self.ran_out_of_memory = None, False

    def _keeper_ended(self) -> KeeperReply:
        """When memory runs out the kernel may kill the keeper instead of an engine."""
        killed = oom_kills() != self._oom_kills
        error = f"its keeper ended. {OOM}" if killed else "its keeper ended"
        return KeeperReply(error=error, out_of_memory=killed)

    def _check_keeper(self) -> None:
        """After a long silence, check that the keeper still answers. Raises KeeperError."""
        try:
            check_keeper(self._settings, self._stopped)
        except KeeperError:
            self._release()
            raise
        self._last_reply_at = awake_seconds()

    def _release(self) -> None:
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = self._record = None
