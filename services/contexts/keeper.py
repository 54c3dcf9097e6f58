"""The keeper of a node: owns its engines' lives, whoever comes and goes."""

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
from services.contexts.records import State, live_records
from services.contracts import Settings
from services.contracts.clock import awake
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
# What ends is gone in less, unless it hangs in the kernel.
_STOPPING_SECONDS = 300.0
_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 20, 0.05
_TIDY_SECONDS = 10.0
# Of the grace period. Workers drain in about as long; what is left is for the engines' own end.
_DRAIN_FRACTION = 0.6

log = structlog.get_logger(__name__)


class Keeper:
    """One a node and user: a lock on the runtime directory sees to that. It survives workers; its
    engines do not survive it.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError for a directory that is not ours, KeeperError where a keeper is."""
        self.settings = settings
        self.directory: Path = open_runtime_dir(settings.runtime_dir)
        lock = take_lock(keeper_lock(self.directory))
        if lock is None:
            raise KeeperError(f"this node has a keeper already, in {self.directory}")
        self._lock = lock
        self.caches = EngineCaches(settings.cache_dir)
        # What a keeper that was killed has left.
        live_records(self.directory)
        remove_fork_server_files(self.directory)
        self._tidy_at = 0.0
        self._engines: dict[str, ManagedEngine] = {}
        self._fork_servers: dict[str, ForkServer] = {}
        self._fork_servers_lock = threading.Lock()
        self._demand: dict[str, int] = {}
        self._changed = threading.Condition()
        # By device, one engine starts or wakes at a time: two would wait for each other, and count
        # the same memory as free.
        self._start_locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(
            threading.Lock
        )
        self._draining = False

    def close(self) -> None:
        """Stop every engine, then the templates."""
        self.drain()
        for fork_server in self._fork_servers.values():
            fork_server.stop()
        os.close(self._lock)

    def recreate_directory(self) -> None:
        """Make a runtime directory again that was removed. Engines whose sockets were in it cannot
        be reached any more, and are stopped; whoever uses one asks for it again.

        Raises UsageError where it cannot be made, KeeperError where another keeper has it now.
        """
        if is_same_file(os.fstat(self._lock), keeper_lock(self.directory)):
            return  # only a socket was removed
        log.warning("directory.removed", directory=str(self.directory))
        open_runtime_dir(self.directory)
        for _ in range(_LOCK_TRIES):
            lock = take_lock(keeper_lock(self.directory))
            if lock is not None:
                break
            time.sleep(_LOCK_PAUSE_SECONDS)  # somebody looks whether there is a keeper
        else:
            raise KeeperError(f"{self.directory} was removed, and has another keeper now")
        os.close(self._lock)
        self._lock = lock
        with self._changed:
            engines = [engine for engine in self._engines.values() if not engine.finished]
        for engine in engines:
            engine.stop(SOCKET_REMOVED)
        with self._fork_servers_lock:  # while its last templates end, nobody gets a new one
            for fork_server in self._fork_servers.values():
                fork_server.stop()
            self._fork_servers.clear()

    def drain(self) -> None:
        """The node is going: start no engine any more, let workers finish with those that there
        are, and stop them.
        """
        log.info("keeper.draining")
        deadline = time.monotonic() + _DRAIN_FRACTION * self.settings.grace_seconds
        with self._changed:
            self._draining = True
            engines = list(self._engines.values())
        for engine in engines:
            # One that sleeps is of use to nobody, or is waited for, and will not be woken.
            if engine.record.state in ("waiting", "starting", "asleep"):
                engine.stop("the node is draining")
        with self._changed:
            while time.monotonic() < deadline and self._in_use():
                self._changed.wait(_POLL_SECONDS)
        self.evict(None)

    def _in_use(self) -> bool:
        return any(
            engine.record.attached and engine.record.state == "warm"
            for engine in self._engines.values()
            if not engine.finished
        )

    @property
    def empty(self) -> bool:
        with self._changed:
            return all(engine.finished for engine in self._engines.values())

    def states(self) -> list[State]:
        """Of every engine that is there, or on its way."""
        with self._changed:
            return [engine.record.state for engine in self._engines.values() if not engine.finished]

    def attach(
        self, plan: EnginePlan, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[ManagedEngine, State | None]:
        """A lease on the engine of this plan, and how it was found: None where there was none, and
        it is started for this lease. An engine that is on its way out is waited for.

        Give it back with `detach`. Raises KeeperError on a node that is draining, when `cancelled`
        says that nobody wants the lease any more, and for an engine that does not end.
        """
        deadline = awake() + _STOPPING_SECONDS
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
            engine.join(_POLL_SECONDS)  # on its way out, then a new one; or falling asleep
            if awake() > deadline:
                raise KeeperError(
                    f"the engine {plan.name} has been ending for {_STOPPING_SECONDS:g} s, and no "
                    f"other may start before it is gone; its log is {engine.record.log}. End this "
                    "node's keeper with `keepwarm contexts evict --all`; if a process of the "
                    "engine stays in the kernel (`ps` shows D), restart the node"
                )
        raise KeeperError("nobody waits for the lease any more")

    def evict(self, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
        """Stop the engines of these names or contexts, or all. The names of those that went within
        the grace period; the others are on their way.
        """
        with self._changed:
            going = [
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
        for engine in going:
            engine.stop("the node is draining" if self._draining else "it was evicted")
        deadline = time.monotonic() + self.settings.grace_seconds
        for engine in going:
            engine.join(max(0.0, deadline - time.monotonic()))
        return tuple(engine.plan.name for engine in going if engine.finished)

    def update_demand(self, claims: Mapping[str, int]) -> None:
        """The latest word on how many claims wait for each context."""
        with self._changed:
            self._demand = dict(claims)
            engines = list(self._engines.values())
        for engine in engines:
            engine.update_demand(sum(claims.get(context_id, 0) for context_id in engine.contexts))

    def tidy(self) -> None:
        """Bound the logs in the runtime directory, now and then."""
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + _TIDY_SECONDS
            with suppress(FileNotFoundError):  # it was removed, and will be made again
                bound_logs(self.directory, self._engine_names())

    def bound_caches(self) -> None:
        """Remove old compile caches where all of them are larger than they may be."""
        self.caches.bound(int(self.settings.cache_gib * _GIB), self._engine_names())

    def _engine_names(self) -> set[str]:
        """Of the engines that are here."""
        with self._changed:
            return {name for name, engine in self._engines.items() if not engine.finished}

    def wait_for_change(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    # What slots need of us.

    def changed(self) -> None:
        """Something about a slot is new."""
        with self._changed:
            self._changed.notify_all()

    def fork_server_for(self, plan: EnginePlan) -> ForkServer:
        """A process with this plan's imports done, or doing them."""
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
        """Hold the right to start or wake an engine, once there is memory for it. False, without
        that right, when nobody waits for the engine any more.

        Raises EngineStartError when others hold the memory and do not let go in time.
        """
        limit = self.settings.engine_start_timeout_seconds
        deadline = awake() + limit
        with self._changed:
            start_lock = self._start_locks[_memory_of(engine)]
        while not start_lock.acquire(timeout=_POLL_SECONDS):
            if engine.abandoned:
                yield False
                return
            if awake() > deadline:
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
        """False when nobody waits for it any more: others want the room."""
        needed = needed_bytes(engine.plan, engine.known_bytes)
        while not engine.abandoned:
            missing = needed - self._available_bytes(engine)
            if missing <= 0:
                return True
            others = self._others_on(engine)
            awake_ones = any(other.record.state != "asleep" for other in others)
            going = _choose_to_free(others, missing, only_if_enough=awake_ones)
            for candidate in going:
                log.info("context.gives_way", context=candidate.name, to=engine.plan.name)
                self._engines[candidate.name].free_memory()
            if not going and not awake_ones:
                # Our estimate may be wrong, and the engine says best what it lacks.
                log.warning("memory.short", context=engine.plan.name, missing_bytes=missing)
                return True
            if not going:
                if awake() > deadline:
                    raise EngineStartError(
                        f"it needs {needed / _GIB:.1f} GiB, and engines that are in use hold them; "
                        "raise KEEPWARM_CONTEXT_MEMORY_GIB, or give fewer contexts to this node"
                    )
                engine.report_progress("waiting for memory that engines in use hold")
                self.wait_for_change(_POLL_SECONDS)
        return False

    def _available_bytes(self, engine: ManagedEngine) -> int:
        """What the slot could have of its device, within the budget. One that sleeps has a part of
        it already.
        """
        free = free_bytes(engine.plan.device) + (engine.record.memory_bytes or 0)
        budget = self.settings.context_memory_gib
        if budget is None:
            return free
        held = sum(other.record.memory_bytes or 0 for other in self._others_on(engine))
        return min(free, int(budget * _GIB) - held)

    def _others_on(self, engine: ManagedEngine) -> list[ManagedEngine]:
        """Engines that hold memory of the same device."""
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
    """Those that nobody uses, as many as are needed. First those that are awake, most of which will
    sleep. One that sleeps keeps little of its device (CUDA's own share, captured graphs), which may
    be what is missing; where that is not enough it sleeps on, if `only_if_enough`. They go one at a
    time, for that little cannot be measured everywhere.
    """
    idle = [candidate for other in others if (candidate := other.candidate()) is not None]
    awake = [candidate for candidate in idle if not candidate.asleep]
    if awake:
        return cheapest_to_lose(awake, missing_bytes)
    if only_if_enough and sum(candidate.memory_bytes for candidate in idle) < missing_bytes:
        return ()
    return cheapest_to_lose(idle, missing_bytes)[:1]


def _memory_of(engine: ManagedEngine) -> tuple[str, str]:
    """Engines of one place share their memory."""
    return engine.plan.device.kind, engine.plan.device.gpu


def _with_keepers_memory(plan: EnginePlan) -> EnginePlan:
    """Engines are the keeper's processes: on processors its memory counts, of which its worker may
    see more, in a container or a job of another size.
    """
    device = plan.device
    if device.kind == "cuda":
        return plan
    least = min(device.memory_bytes, free_bytes(device))
    return plan.model_copy(update={"device": replace(device, memory_bytes=least)})
