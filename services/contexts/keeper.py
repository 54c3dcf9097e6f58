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
    free_bytes,
    needed_bytes,
    template_environment,
)
from services.contexts.eviction import Candidate, cheapest_to_lose
from services.contexts.fork_server_client import TEMPLATE_NAMES, ForkServer, remove_templates
from services.contexts.managed_engine import SOCKET_REMOVED, ManagedEngine
from services.contexts.plan import EnginePlan
from services.contexts.records import State, live_records
from services.contracts import Settings
from services.contracts.clock import awake
from services.contracts.errors import EngineStartError, KeeperError
from services.contracts.values import content_id
from services.node.runtime_dir import (
    bound_logs,
    is_still_at,
    keeper_lock,
    open_runtime_dir,
    take_lock,
)

_GIB = 1024**3
_LOOK_SECONDS = 0.2
# What ends is gone in less, unless it hangs in the kernel.
_STOPPING_SECONDS = 300.0
_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 20, 0.05
_TIDY_SECONDS = 10.0
# Of the grace period. Workers drain in about as long; what is left is for the engines' own end.
_DRAIN_PART = 0.6

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
        remove_templates(self.directory)
        self._tidy_at = 0.0
        self._slots: dict[str, ManagedEngine] = {}
        self._templates: dict[str, ForkServer] = {}
        self._templating = threading.Lock()
        self._demand: dict[str, int] = {}
        self._changed = threading.Condition()
        # By device, one engine starts or wakes at a time: two would wait for each other, and count
        # the same memory as free.
        self._room: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)
        self._draining = False

    def close(self) -> None:
        """Stop every engine, then the templates."""
        self.drain()
        for template in self._templates.values():
            template.stop()
        os.close(self._lock)

    def renew_directory(self) -> None:
        """Make a runtime directory again that was removed. Engines whose sockets were in it cannot
        be reached any more, and are stopped; whoever uses one asks for it again.

        Raises UsageError where it cannot be made, KeeperError where another keeper has it now.
        """
        if is_still_at(os.fstat(self._lock), keeper_lock(self.directory)):
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
            slots = [slot for slot in self._slots.values() if not slot.finished]
        for slot in slots:
            slot.stop(SOCKET_REMOVED)
        with self._templating:  # while its last templates end, nobody gets a new one
            for template in self._templates.values():
                template.stop()
            self._templates.clear()

    def drain(self) -> None:
        """The node is going: start no engine any more, let workers finish with those that there
        are, and stop them.
        """
        log.info("keeper.draining")
        deadline = time.monotonic() + _DRAIN_PART * self.settings.grace_seconds
        with self._changed:
            self._draining = True
            slots = list(self._slots.values())
        for slot in slots:
            # One that sleeps is of use to nobody, or is waited for, and will not be woken.
            if slot.record.state in ("waiting", "starting", "asleep"):
                slot.stop("the node is draining")
        with self._changed:
            while time.monotonic() < deadline and self._in_use():
                self._changed.wait(_LOOK_SECONDS)
        self.evict(None)

    def _in_use(self) -> bool:
        return any(
            slot.record.attached and slot.record.state == "warm"
            for slot in self._slots.values()
            if not slot.finished
        )

    @property
    def empty(self) -> bool:
        with self._changed:
            return all(slot.finished for slot in self._slots.values())

    def states(self) -> list[State]:
        """Of every engine that is there, or on its way."""
        with self._changed:
            return [slot.record.state for slot in self._slots.values() if not slot.finished]

    def attach(
        self, plan: EnginePlan, given_up: Callable[[], bool] = lambda: False
    ) -> tuple[ManagedEngine, State | None]:
        """A lease on the engine of this plan, and how it was found: None where there was none, and
        it is started for this lease. An engine that is on its way out is waited for.

        Give it back with `detach`. Raises KeeperError on a node that is draining, when `given_up`
        says that nobody wants the lease any more, and for an engine that does not end.
        """
        deadline = awake() + _STOPPING_SECONDS
        while not given_up():
            with self._changed:
                if self._draining:
                    raise KeeperError("this node is draining: its keeper starts no engine")
                slot = self._slots.get(plan.name)
                found = None if slot is None or slot.finished else slot.record.state
                if slot is None or slot.finished:
                    slot = ManagedEngine(
                        _as_seen_here(plan), self, self._demand.get(plan.spec.context_id, 0)
                    )
                    self._slots[plan.name] = slot
                    slot.begin()
            if slot.attach():
                return slot, found
            slot.join(_LOOK_SECONDS)  # on its way out, then a new one; or falling asleep
            if awake() > deadline:
                raise KeeperError(
                    f"the engine {plan.name} has been ending for {_STOPPING_SECONDS:g} s, and no "
                    f"other may start before it is gone; its log is {slot.record.log}. End this "
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
                slot
                for slot in self._slots.values()
                if not slot.finished
                and (
                    wanted is None
                    or slot.plan.name in wanted
                    or slot.plan.spec.base.context_id in wanted
                    or not slot.contexts.isdisjoint(wanted)
                )
            ]
        for slot in going:
            slot.stop("the node is draining" if self._draining else "it was evicted")
        deadline = time.monotonic() + self.settings.grace_seconds
        for slot in going:
            slot.join(max(0.0, deadline - time.monotonic()))
        return tuple(slot.plan.name for slot in going if slot.finished)

    def hear_demand(self, claims: Mapping[str, int]) -> None:
        """The latest word on how many claims wait for each context."""
        with self._changed:
            self._demand = dict(claims)
            slots = list(self._slots.values())
        for slot in slots:
            slot.hear_demand(sum(claims.get(context_id, 0) for context_id in slot.contexts))

    def tidy(self) -> None:
        """Bound the logs in the runtime directory, now and then."""
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + _TIDY_SECONDS
            with suppress(FileNotFoundError):  # it was removed, and will be made again
                bound_logs(self.directory, self._names())

    def bound_caches(self) -> None:
        """Remove old compile caches where all of them are larger than they may be."""
        self.caches.bound(int(self.settings.cache_gib * _GIB), self._names())

    def _names(self) -> set[str]:
        """Of the engines that are here."""
        with self._changed:
            return {name for name, slot in self._slots.items() if not slot.finished}

    def wait_for_change(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    # What slots need of us.

    def changed(self) -> None:
        """Something about a slot is new."""
        with self._changed:
            self._changed.notify_all()

    def template_for(self, plan: EnginePlan) -> ForkServer:
        """A process with this plan's imports done, or doing them."""
        environment = template_environment(plan)
        name = content_id(TEMPLATE_NAMES, [plan.python, environment], hex_digits=8)
        with self._templating:
            template = self._templates.get(name)
            if template is not None and not template.alive:
                template.stop()
                template = None
            if template is None:
                template = self._templates[name] = ForkServer(
                    plan.python,
                    ENGINE_MODULE,
                    environment,
                    self.directory,
                    name,
                    0.2 * self.settings.grace_seconds,
                )
            return template

    @contextmanager
    def room_for(self, slot: ManagedEngine) -> Iterator[bool]:
        """Hold the right to start or wake an engine, once there is memory for it. False, without
        that right, when nobody waits for the engine any more.

        Raises EngineStartError when others hold the memory and do not let go in time.
        """
        limit = self.settings.engine_start_timeout_seconds
        deadline = awake() + limit
        with self._changed:
            room = self._room[_place(slot)]
        while not room.acquire(timeout=_LOOK_SECONDS):
            if slot.abandoned:
                yield False
                return
            if awake() > deadline:
                raise EngineStartError(
                    f"its turn did not come within {limit:g} s "
                    "(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS): engines start one after the other on "
                    f"{slot.record.device}, and `keepwarm contexts list` shows which starts now"
                )
        try:
            yield self._make_room(slot, deadline)
        finally:
            room.release()

    def _make_room(self, slot: ManagedEngine, deadline: float) -> bool:
        """False when nobody waits for it any more: others want the room."""
        needed = needed_bytes(slot.plan, slot.known_bytes)
        while not slot.abandoned:
            missing = needed - self._available(slot)
            if missing <= 0:
                return True
            others = self._others_on(slot)
            awake_ones = any(other.record.state != "asleep" for other in others)
            going = _who_goes(others, missing, only_if_enough=awake_ones)
            for candidate in going:
                log.info("context.gives_way", context=candidate.name, to=slot.plan.name)
                self._slots[candidate.name].give_way()
            if not going and not awake_ones:
                # Our estimate may be wrong, and the engine says best what it lacks.
                log.warning("memory.short", context=slot.plan.name, missing_bytes=missing)
                return True
            if not going:
                if awake() > deadline:
                    raise EngineStartError(
                        f"it needs {needed / _GIB:.1f} GiB, and engines that are in use hold them; "
                        "raise KEEPWARM_CONTEXT_MEMORY_GIB, or give fewer contexts to this node"
                    )
                slot.note_waiting("waiting for memory that engines in use hold")
                self.wait_for_change(_LOOK_SECONDS)
        return False

    def _available(self, slot: ManagedEngine) -> int:
        """What the slot could have of its device, within the budget. One that sleeps has a part of
        it already.
        """
        free = free_bytes(slot.plan.device) + (slot.record.memory_bytes or 0)
        budget = self.settings.context_memory_gib
        if budget is None:
            return free
        held = sum(other.record.memory_bytes or 0 for other in self._others_on(slot))
        return min(free, int(budget * _GIB) - held)

    def _others_on(self, slot: ManagedEngine) -> list[ManagedEngine]:
        """Engines that hold memory of the same device."""
        with self._changed:
            return [
                other
                for other in self._slots.values()
                if other is not slot
                and not other.finished
                and other.record.state != "waiting"
                and _place(other) == _place(slot)
            ]


def _who_goes(
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


def _place(slot: ManagedEngine) -> tuple[str, str]:
    """Engines of one place share their memory."""
    return slot.plan.device.kind, slot.plan.device.gpu


def _as_seen_here(plan: EnginePlan) -> EnginePlan:
    """Engines are the keeper's processes: on processors its memory counts, of which its worker may
    see more, in a container or a job of another size.
    """
    device = plan.device
    if device.kind == "cuda":
        return plan
    least = min(device.memory_bytes, free_bytes(device))
    return plan.model_copy(update={"device": replace(device, memory_bytes=least)})
