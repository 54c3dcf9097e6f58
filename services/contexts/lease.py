"""A worker's lease on an engine of its node: found or started, watched, given back."""

import contextlib
import select
import threading
import time
from collections.abc import Callable

import structlog

from services.contexts.engine import start_error
from services.contexts.engine_client import CompletionClient
from services.contexts.engine_log import OOM, oom_kills, tells_of_memory
from services.contexts.metrics import ATTACHES
from services.contexts.plan import EnginePlan
from services.contexts.protocol import (
    Attach,
    Demand,
    DescribeDevice,
    Drain,
    Evict,
    KeeperChannel,
    KeeperReply,
)
from services.contexts.records import ContextRecord, State
from services.contexts.start_keeper import connected, open_keeper
from services.contracts import Settings
from services.contracts.clock import awake
from services.contracts.errors import EngineStartError, KeeperError
from services.contracts.startup import StartupPhases
from services.node.runtime_dir import (
    is_locked,
    keeper_lock,
    log_tail,
    open_runtime_dir,
    socket_path,
)

_WORD_SECONDS = 0.1
_LOOK_SECONDS = 3.0
_REPORT_SECONDS = 5.0
_EVICT_SECONDS = 60.0
_END_SECONDS = 10.0
# A keeper says once a second how a start goes, and nothing while that waits for its turn.
_SILENT_SECONDS, _ANSWER_SECONDS = 60.0, 10.0

log = structlog.get_logger(__name__)


class EngineLease:
    """What a worker knows of its engine. The keeper starts and stops it; while this object holds a
    lease it is not put away. A worker that dies lets go by dying.

    After the engine has died, `start` asks for a new one. `stop` may be called from any thread.
    """

    def __init__(
        self,
        plan: EnginePlan,
        settings: Settings,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`meanwhile` is called several times a second by whoever waits in `start`.

        Raises UsageError for a runtime directory that is unusable.
        """
        self.plan = plan
        self._meanwhile = meanwhile
        self._settings = settings
        self._directory = open_runtime_dir(settings.runtime_dir)
        self._line: KeeperChannel | None = None
        self._record: ContextRecord | None = None
        self.gone: str | None = None
        """Why there is no engine any more, as its keeper said."""
        self._stopped: Callable[[], bool] = lambda: False
        self._listening = threading.Lock()
        self._heard_at = awake()
        self._oom_kills = oom_kills()
        self.starts = 0
        """How often we came to have it."""
        self.warm = False
        """Whether the engine was warm when we came."""
        self.seconds = 0.0
        """From our wish to its warmth."""
        self.max_model_tokens: int | None = None
        """The most tokens that the engine takes, as it says itself. Fewer than its context has,
        where the operator's arguments say so.
        """
        self.log_file = self._directory / f"{plan.name}.log"
        self.client = CompletionClient(
            socket_path(self._directory, plan.name),
            plan.spec.context_id,
            settings.engine_request_timeout_seconds,
        )

    @property
    def phases(self) -> StartupPhases | None:
        """Of the engine's start, where it was started for us; None where it was here, or was
        started for somebody else.
        """
        return None if self._record is None else self._record.phases

    @property
    def state(self) -> State | None:
        """As last heard; None where there is no engine. Unlike `alive` it does not listen."""
        record = self._record
        return None if record is None else record.state

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether the engine is gone because memory ran out, as its keeper says."""
        return self.gone is not None and tells_of_memory(self.gone)

    @property
    def alive(self) -> bool:
        """Whether it is here and warm, by its keeper's latest word. Does not wait for that, nor for
        a start that goes on in another thread.
        """
        with self._listening:
            self._hear()
            return self.state == "warm"

    def look(self) -> None:
        """After a request failed: if the engine is gone, have heard so from the keeper."""
        deadline = time.monotonic() + _LOOK_SECONDS
        while self.alive and not self.client.healthy() and time.monotonic() < deadline:
            time.sleep(_WORD_SECONDS)

    def start(self, stop: threading.Event) -> bool:
        """Have the engine, warm; it may be so already. False when `stop` was set meanwhile.

        Raises EngineStartError, with the end of the engine's log, when there can be none;
        KeeperError when there is no keeper and none can be started.
        """
        started = reported = time.monotonic()
        log.info("engine.starting", context=self.plan.spec.context_id, log=str(self.log_file))
        self._let_go()
        self.gone, self._stopped = None, stop.is_set
        self._oom_kills = oom_kills()
        line = open_keeper(self._settings, stop.is_set)
        if line is None:
            return False
        with self._listening:
            self._line, self._heard_at = line, awake()
            line.send(Attach(plan=self.plan))
        while not self.alive:
            if stop.is_set():
                break
            if self._line is None:
                ATTACHES.labels("failed").inc()
                raise EngineStartError(self.gone or "its keeper ended")
            if awake() - self._heard_at > _SILENT_SECONDS:
                self._look_at_keeper()
            with contextlib.suppress(OSError, ValueError):  # another thread has closed it
                select.select([line], [], [], _WORD_SECONDS)
            self._meanwhile()
            now = time.monotonic()
            record = self._record
            if record is not None and now - reported >= _REPORT_SECONDS:
                reported = now
                log.info(
                    "engine.loading",
                    seconds=round(now - started),
                    state=record.state,
                    says=record.says,
                )
        if stop.is_set():
            self._let_go()
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
        """End the engine, for it hangs; others that use it will find it so as well."""
        try:
            evict(self._settings, (self.plan.name,), self._stopped)
        except KeeperError as error:  # whoever starts the engine again finds out how things are
            log.warning("engine.not_evicted", reason=str(error))
        self._let_go()

    def close(self) -> None:
        """Give the lease back. The engine stays warm for whoever comes next."""
        self._let_go()

    def tell_demand(self, claims: dict[str, int]) -> None:
        """Let the keeper know what waits for contexts: it decides who makes room for whom."""
        with self._listening:
            if self._line is not None:
                with contextlib.suppress(KeeperError):  # it may be gone, as we shall hear
                    self._line.send(Demand(claims=claims))

    def last_words(self) -> list[str]:
        """The end of its log, without empty lines."""
        return log_tail(self.log_file)

    def start_error(self, what: str) -> EngineStartError:
        """What to raise when it cannot be used, with the end of its log."""
        return start_error(self.plan, self.log_file, what)

    def _hear(self) -> None:
        """With the lock held: the keeper's words that have come."""
        while self._line is not None:
            try:
                word = self._line.word(0)
            except TimeoutError:
                return
            self._heard_at = awake()
            if word is None or word.gone is not None:
                self.gone = self._keeper_ended() if word is None else word.gone
                self._line.close()
                self._line = self._record = None
            elif word.record is not None:
                self._record, self.warm = word.record, word.warm

    def _keeper_ended(self) -> str:
        """Where the kernel lacks memory, it may choose the keeper, and not an engine."""
        return "its keeper ended" if oom_kills() == self._oom_kills else f"its keeper ended. {OOM}"

    def _look_at_keeper(self) -> None:
        """It has said nothing for long: does it answer at all? Raises KeeperError."""
        try:
            _ask(self._settings, DescribeDevice(), _ANSWER_SECONDS, self._stopped)
        except KeeperError:
            self._let_go()
            raise
        self._heard_at = awake()

    def _let_go(self) -> None:
        with self._listening:
            if self._line is not None:
                self._line.close()
            self._line = self._record = None


def evict(
    settings: Settings, wanted: tuple[str, ...], stopped: Callable[[], bool] = lambda: False
) -> tuple[str, ...]:
    """Stop engines, by name or context. The names of those that went; none where no keeper is, or
    when `stopped` says so before it has answered.

    Raises KeeperError when it does not answer.
    """
    return _ask(settings, Evict(wanted=wanted), _drain_seconds(settings), stopped).done


def drain(settings: Settings) -> None:
    """Stop every engine of this node, and its keeper. Returns when it is gone.

    Raises KeeperError when it does not answer.
    """
    _ask(settings, Drain(), _drain_seconds(settings))
    lock = keeper_lock(open_runtime_dir(settings.runtime_dir))
    deadline = time.monotonic() + _END_SECONDS
    while is_locked(lock) and time.monotonic() < deadline:
        time.sleep(_WORD_SECONDS)


def _drain_seconds(settings: Settings) -> float:
    """Up to 60 % of the grace period for workers to finish, and once more for the engines' end."""
    return 2 * settings.grace_seconds + _EVICT_SECONDS


def _ask(
    settings: Settings,
    request: DescribeDevice | Evict | Drain,
    seconds: float,
    stopped: Callable[[], bool] = lambda: False,
) -> KeeperReply:
    line = connected(open_runtime_dir(settings.runtime_dir))
    if line is None:
        return KeeperReply()
    with contextlib.closing(line):
        return line.ask(request, seconds, stopped) or KeeperReply()
