"""The keeper of a node: it owns the node's engines, which outlive workers and runs."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from services.contexts.caches import EngineCaches
from services.contexts.engine_command import (
    ENGINE_MODULE,
    fork_server_environment,
    free_bytes,
    needed_bytes,
)
from services.contexts.eviction import Candidate, cheapest_to_lose
from services.contexts.fork_server_client import (
    FORK_SERVER_PREFIX,
    ForkServer,
    remove_fork_server_files,
)
from services.contexts.managed_engine import SOCKET_REMOVED, ManagedEngine
from services.contexts.plan import EnginePlan
from services.contexts.protocol import ContextRecord, State
from services.contracts import Settings
from services.contracts.clock import awake_seconds
from services.contracts.errors import EngineStartError, KeeperError
from services.contracts.values import content_id
from services.node.runtime_dir import (
    bound_logs,
    is_same_file,
    keeper_lock,
    open_runtime_dir,
    take_lock,
)

_GIB = 1024**3
_POLL_SECONDS = 0.2
# An engine takes less time to stop, unless it hangs in the kernel.
_STOPPING_SECONDS = 300.0
_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 20, 0.05
_LIMIT_LOGS_SECONDS = 10.0
# The part of the grace period in which workers may finish; engines stop in the rest of it.
_DRAIN_FRACTION = 0.6

log = structlog.get_logger(__name__)


class Keeper:
    """Owns the engines of one user on one node. A lock on the runtime directory ensures that there
    is only one keeper. It outlives workers; its engines never outlive it.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError for a directory of another user, KeeperError if a keeper has it."""
        self.settings = settings
        self.directory: Path = open_runtime_dir(settings.runtime_dir)
        lock = take_lock(keeper_lock(self.directory))
        if lock is None:
            raise KeeperError(f"this node has a keeper already, in {self.directory}")
        self._lock = lock
        self.caches = EngineCaches(settings.cache_dir)
        # Left by a keeper that was killed. The logs of its engines stay: they may say why.
        for left in self.directory.glob("ctx-*.sock"):
            left.unlink(missing_ok=True)
        remove_fork_server_files(self.directory)
        self._limit_logs_at = 0.0
        self._engines: dict[str, ManagedEngine] = {}
        self._fork_servers: dict[str, ForkServer] = {}
        self._fork_servers_lock = threading.Lock()
        self._demand: dict[str, int] = {}
        self._changed = threading.Condition()
        # One engine starts or wakes at a time on each device: two would count the same memory as
        # free, and wait for each other.
        self._start_locks: defaultdict[tuple[str, str], threading.Lock]
        self._start_locks = defaultdict(threading.Lock)
        self._draining = False

    def close(self) -> None:
        """Stop every engine, then the fork servers."""
        self.drain()
        for fork_server in self._fork_servers.values():
            fork_server.stop()
        os.close(self._lock)

    def recreate_directory(self) -> None:
        """Make the runtime directory again after it was removed. Stops every engine, because their
        sockets are gone; workers then attach again.

        Raises UsageError if it cannot be made, KeeperError if another keeper has it now.
        """
        if is_same_file(os.fstat(self._lock), keeper_lock(self.directory)):
            return  # only a socket was removed
        log.warning("directory.removed", directory=str(self.directory))
        open_runtime_dir(self.directory)
        for _ in range(_LOCK_TRIES):
            lock = take_lock(keeper_lock(self.directory))
            if lock is not None:
                break
            time.sleep(_LOCK_PAUSE_SECONDS)  # `is_locked` in another process holds it for a moment
        else:
            raise KeeperError(f"{self.directory} was removed, and has another keeper now")
        os.close(self._lock)
        self._lock = lock
        with self._changed:
            engines = [engine for engine in self._engines.values() if not engine.finished]
        for engine in engines:
            engine.stop(SOCKET_REMOVED)
        with self._fork_servers_lock:  # no engine gets a new fork server while these stop
            for fork_server in self._fork_servers.values():
                fork_server.stop()
            self._fork_servers.clear()

    def drain(self) -> tuple[str, ...]:
        """Start no more engines, let workers finish with the warm ones, then stop all engines.
        Takes up to 160 % of the grace period. Returns the names of the engines that ended.
        """
        log.info("keeper.draining")
        deadline = time.monotonic() + _DRAIN_FRACTION * self.settings.grace_seconds
        with self._changed:
            self._draining = True
            engines = [engine for engine in self._engines.values() if not engine.finished]
        for engine in engines:
            # A sleeping engine has no worker, or one that waits for it; it is not woken any more.
            if engine.record.state in ("waiting", "starting", "asleep"):
                engine.stop("the node is draining")
        with self._changed:
            while time.monotonic() < deadline and self._any_in_use():
                self._changed.wait(_POLL_SECONDS)
        self.evict(None)
        return tuple(engine.plan.name for engine in engines if engine.finished)

    def _any_in_use(self) -> bool:
        return any(
            engine.record.attached and engine.record.state == "warm"
            for engine in self._engines.values()
            if not engine.finished
        )

    @property
    def empty(self) -> bool:
        """Whether all engines have ended."""
        with self._changed:
            return all(engine.finished for engine in self._engines.values())

    def records(self) -> tuple[ContextRecord, ...]:
        """The engines that have not ended, the oldest first."""
        with self._changed:
            records = [e.record for e in self._engines.values() if not e.finished]
        return tuple(sorted(records, key=lambda record: record.since))

    def attach(
        self, plan: EnginePlan, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[ManagedEngine, State | None]:
        """Lease the engine of this plan, and start it if there is none. If one is stopping, wait
        for it to end. Give the lease back with `detach`.

        Returns the engine and the state in which it was found, None if it was started for this
        lease. Raises KeeperError on a node that is draining, when `cancelled` becomes true, and
        when an engine that is stopping does not end.
        """
        deadline = awake_seconds() + _STOPPING_SECONDS
        while not cancelled():
            with self._changed:
                if self._draining:
                    raise KeeperError("this node is draining: its keeper starts no engine")
                engine = self._engines.get(plan.name)
                found = None if engine is None or engine.finished else engine.record.state
                if engine is None or engine.finished:
                    engine = ManagedEngine(
                        _with_keepers_memory(plan), self, self._demand.get(plan.spec.context_id, 0)
                    )
                    self._engines[plan.name] = engine
                    engine.start()
            if engine.attach():
                return engine, found
            engine.join(_POLL_SECONDS)  # it is stopping, or is being put to sleep
            if awake_seconds() > deadline:
                raise KeeperError(
                    f"the engine {plan.name} has been ending for {_STOPPING_SECONDS:g} s, and no "
                    f"other may start before it is gone; its log is {engine.record.log}. End this "
                    "node's keeper with `keepwarm contexts evict --all`; if a process of the "
                    "engine stays in the kernel (`ps` shows D), restart the node"
                )
        raise KeeperError("the worker that asked for the lease is gone")

    def evict(self, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
        """Stop the engines of these names or context ids; None stops all.

        Returns the names of those that ended within the grace period. The others are stopping.
        """
        with self._changed:
            stopping = [
                engine
                for engine in self._engines.values()
                if not engine.finished
                and (
                    wanted is None
                    or engine.plan.name in wanted
                    or engine.plan.spec.base.context_id in wanted
                    or not engine.contexts.isdisjoint(wanted)
                )
            ]
        for engine in stopping:
            engine.stop("the node is draining" if self._draining else "it was evicted")
        deadline = time.monotonic() + self.settings.grace_seconds
        for engine in stopping:
            engine.join(max(0.0, deadline - time.monotonic()))
        return tuple(engine.plan.name for engine in stopping if engine.finished)

    def update_demand(self, claims: Mapping[str, int]) -> None:
        """Replace what is known of demand: how many claims wait for each context."""
        with self._changed:
            self._demand = dict(claims)
            engines = list(self._engines.values())
        for engine in engines:
            engine.update_demand(sum(claims.get(context_id, 0) for context_id in engine.contexts))

    def limit_logs(self) -> None:
        """Limit the size of the logs in the runtime directory, at most every ten seconds."""
        if time.monotonic() >= self._limit_logs_at:
            self._limit_logs_at = time.monotonic() + _LIMIT_LOGS_SECONDS
            with suppress(FileNotFoundError):  # the directory was removed; it is made again soon
                bound_logs(self.directory, self._live_names())

    def bound_caches(self) -> None:
        """Remove the oldest compile caches when all of them together exceed their limit."""
        self.caches.bound(int(self.settings.cache_gib * _GIB), self._live_names())

    def _live_names(self) -> set[str]:
        with self._changed:
            return {name for name, engine in self._engines.items() if not engine.finished}

    def wait_for_change(self, seconds: float) -> None:
        """Wait until an engine's record changes, or for this time."""
        with self._changed:
            self._changed.wait(seconds)

    # What a `ManagedEngine` uses (`EngineOwner`).

    def changed(self) -> None:
        """Wake those who wait for a change of an engine's record."""
        with self._changed:
            self._changed.notify_all()

    def fork_server_for(self, plan: EnginePlan) -> ForkServer:
        """The fork server for this plan's interpreter and environment; started if there is none."""
        environment = fork_server_environment(plan)
        name = content_id(FORK_SERVER_PREFIX, [plan.python, environment], hex_digits=8)
        with self._fork_servers_lock:
            fork_server = self._fork_servers.get(name)
            if fork_server is not None and not fork_server.alive:
                fork_server.stop()
                fork_server = None
            if fork_server is None:
                fork_server = self._fork_servers[name] = ForkServer(
                    plan.python,
                    ENGINE_MODULE,
                    environment,
                    self.directory,
                    name,
                    0.2 * self.settings.grace_seconds,
                )
            return fork_server

    @contextmanager
    def reserve_memory(self, engine: ManagedEngine) -> Iterator[bool]:
        """Wait for the engine's turn to start or wake on its device, and for enough free memory.
        Until the block ends no other engine starts there. Yields False, with nothing reserved, when
        no worker waits for the engine any more.

        Raises EngineStartError when the memory does not become free in time.
        """
        limit = self.settings.engine_start_timeout_seconds
        deadline = awake_seconds() + limit
        with self._changed:
            start_lock = self._start_locks[_memory_of(engine)]
        while not start_lock.acquire(timeout=_POLL_SECONDS):
            if engine.abandoned:
                yield False
                return
            if awake_seconds() > deadline:
                raise EngineStartError(
                    f"its turn did not come within {limit:g} s "
                    "(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS): engines start one after the other on "
                    f"{engine.record.device}, and `keepwarm contexts list` shows which starts now"
                )
        try:
            yield self._wait_for_memory(engine, deadline)
        finally:
            start_lock.release()

    def _wait_for_memory(self, engine: ManagedEngine, deadline: float) -> bool:
        """Free memory of idle engines until there is enough. False when no worker waits any more:
        then the memory is left to others.
        """
        needed = needed_bytes(engine.plan, engine.known_bytes)
        while not engine.abandoned:
            missing = needed - self._available_bytes(engine)
            if missing <= 0:
                return True
            others = self._others_on_device(engine)
            any_awake = any(other.record.state != "asleep" for other in others)
            to_free = _choose_to_free(others, missing, only_if_enough=any_awake)
            for candidate in to_free:
                log.info("context.freed", context=candidate.name, needed_by=engine.plan.name)
                self._engines[candidate.name].free_memory()
            if not to_free and not any_awake:
                # Our estimate may be wrong, and the engine's own error message is more precise.
                log.warning("memory.short", context=engine.plan.name, missing_bytes=missing)
                return True
            if not to_free:
                if awake_seconds() > deadline:
                    raise EngineStartError(
                        f"it needs {needed / _GIB:.1f} GiB, and engines that are in use hold them; "
                        "raise KEEPWARM_CONTEXT_MEMORY_GIB, or give fewer contexts to this node"
                    )
                engine.report_progress("waiting for memory that engines in use hold")
                self.wait_for_change(_POLL_SECONDS)
        return False

    def _available_bytes(self, engine: ManagedEngine) -> int:
        """How much of its device the engine could have, within the budget, including what it holds
        while it is asleep.
        """
        free = free_bytes(engine.plan.device) + (engine.record.memory_bytes or 0)
        budget = self.settings.context_memory_gib
        if budget is None:
            return free
        held = sum(other.record.memory_bytes or 0 for other in self._others_on_device(engine))
        return min(free, int(budget * _GIB) - held)

    def _others_on_device(self, engine: ManagedEngine) -> list[ManagedEngine]:
        """Other engines that hold memory of the same device."""
        with self._changed:
            return [
                other
                for other in self._engines.values()
                if other is not engine
                and not other.finished
                and other.record.state != "waiting"
                and _memory_of(other) == _memory_of(engine)
            ]


def _choose_to_free(
    others: Iterable[ManagedEngine], missing_bytes: int, *, only_if_enough: bool
) -> Sequence[Candidate]:
    """The idle engines whose memory is to be freed.

    Warm engines come first, as many as are needed; most of them are put to sleep. If all idle
    engines are asleep, at most one is chosen: a sleeping engine still holds a little of its device
    (CUDA's own memory, captured graphs), which cannot be measured everywhere. With `only_if_enough`
    none is chosen unless all of them together free enough.
    """
    idle = [candidate for other in others if (candidate := other.candidate()) is not None]
    warm = [candidate for candidate in idle if not candidate.asleep]
    if warm:
        return cheapest_to_lose(warm, missing_bytes)
    if only_if_enough and sum(candidate.memory_bytes for candidate in idle) < missing_bytes:
        return ()
    return cheapest_to_lose(idle, missing_bytes)[:1]


def _memory_of(engine: ManagedEngine) -> tuple[str, str]:
    """Which memory the engine uses: engines with equal values share it."""
    return engine.plan.device.kind, engine.plan.device.gpu


def _with_keepers_memory(plan: EnginePlan) -> EnginePlan:
    """On processors, limit the plan's memory to what the keeper sees. Engines are the keeper's
    processes, and a worker in another container or job may see more.
    """
    device = plan.device
    if device.kind == "cuda":
        return plan
    least = min(device.memory_bytes, free_bytes(device))
    return plan.model_copy(update={"device": replace(device, memory_bytes=least)})
