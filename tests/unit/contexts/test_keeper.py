"""The keeper in this process, on the test engine: starts, leases, eviction and waiting."""

import errno
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.contexts import keeper_client
from services.contexts.caches import EngineCaches
from services.contexts.engine import Engine
from services.contexts.fork_server_client import has_fork_server
from services.contexts.keeper import Keeper
from services.contexts.keeper_client import engines
from services.contexts.keeper_server import KeeperServer
from services.contexts.managed_engine import ManagedEngine
from services.contexts.metrics import WRONG_ENGINES
from services.contexts.plan import EnginePlan
from services.contexts.protocol import (
    Attach,
    ContextRecord,
    Demand,
    Drain,
    KeeperChannel,
    KeeperReply,
    State,
)
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineRequestError, EngineStartError, KeeperError
from services.node.device import Device
from services.node.runtime_dir import keeper_socket
from tests.conftest import remove_at_once
from tests.safetensors_files import write_safetensors

# httpcore leaves a socket that could not connect to Python's garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

GENEROUS_SECONDS = 60.0
# What each engine needs, and all that there is: more than any process holds.
ALL_BYTES = 2**50


def wait_until(met: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not (found := met()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)
    return found


class Node:
    """A keeper, and leases on its engines as workers would have them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.keeper = Keeper(load_settings())
        self.holds: tuple[State, ...] = ("starting", "warm", "stopping")
        """Engines in these states take the whole of the node's memory."""

    def free_bytes(self, _: Device) -> int:
        engines = self.keeper._engines.values()
        taken = any(not s.finished and s.record.state in self.holds for s in engines)
        return 0 if taken else ALL_BYTES

    def plan(self, context: str) -> EnginePlan:
        spec = ContextSpec(model=str(self._directory / context))
        device = Device("cpu", "Xeon", 2**34, tuple(os.sched_getaffinity(0)))
        return EnginePlan.of(spec, device, load_settings())

    def attach(self, context: str) -> ManagedEngine:
        managed, _ = self.keeper.attach(self.plan(context))
        return managed

    def warm(self, context: str) -> ManagedEngine:
        """With a lease on it."""
        managed = self.attach(context)
        self.comes(managed, "warm")
        return managed

    def idle(self, context: str) -> ManagedEngine:
        managed = self.warm(context)
        managed.detach()
        return managed

    def comes(self, managed: ManagedEngine, state: State) -> None:
        wait_until(
            lambda: managed.record.state == state or managed.ended_because,
            f"{state}: {managed.record}",
        )
        assert managed.ended_because is None, managed.ended_because

    def goes(self, managed: ManagedEngine) -> str:
        managed.join(GENEROUS_SECONDS)
        assert managed.ended_because is not None
        return managed.ended_because

    def records(self) -> tuple[ContextRecord, ...]:
        return self.keeper.records()


@pytest.fixture
def start(
    tmp_path: Path, doubles_python: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def start(**settings: str) -> Node:
        for name, value in {
            "KEEPWARM_ENGINE_PYTHON": str(doubles_python),
            "VLLM_TEST_JOURNAL": str(tmp_path / "journal"),
            "KEEPWARM_RUNTIME_DIR": str(tmp_path / "run"),
            "KEEPWARM_CACHE_DIR": str(tmp_path / "cache"),
            "KEEPWARM_GRACE_SECONDS": "5",
            **settings,
        }.items():
            monkeypatch.setenv(name, value)
        nodes.append(Node(tmp_path))
        # One engine fits, and no two.
        monkeypatch.setattr("services.contexts.keeper.needed_bytes", lambda *_: ALL_BYTES)
        monkeypatch.setattr("services.contexts.keeper.free_bytes", nodes[-1].free_bytes)
        return nodes[-1]

    yield start
    for node in nodes:
        for managed in node.keeper._engines.values():
            managed.stop("the test is over")
            managed.join(GENEROUS_SECONDS)
        node.keeper.close()
    gc.collect()  # here, and not in the midst of another file's tests


@pytest.fixture
def sleepy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines can sleep, as on CUDA."""
    monkeypatch.setattr(ManagedEngine, "_can_sleep", lambda _: True)


def journal(directory: Path) -> list[str]:
    return (directory / "journal").read_text().split()


def process_of(managed: ManagedEngine) -> psutil.Process:
    assert managed.record.pid is not None
    return psutil.Process(managed.record.pid)


# One engine for all who want it.


def adapter_plan(node: Node, directory: Path, name: str) -> EnginePlan:
    adapter = directory / name
    adapter.mkdir(exist_ok=True)
    plan = node.plan("a")
    spec = plan.spec.model_copy(update={"adapter": str(adapter), "adapter_revision": f"f-{name}"})
    return plan.model_copy(update={"spec": spec})


def lease(node: Node, plan: EnginePlan) -> tuple[ManagedEngine, KeeperReply]:
    """What a worker that attaches with this plan hears in the end."""
    ours, theirs = map(KeeperChannel, socket.socketpair())
    server = KeeperServer(node.keeper, until_idle=False)
    holding = threading.Thread(target=server._handle_request, args=(theirs,))
    holding.start()
    ours.send(Attach(plan=plan))
    reply = ours.reply(GENEROUS_SECONDS)
    while (
        reply is not None and reply.error is None and reply.record and reply.record.state != "warm"
    ):
        reply = ours.reply(GENEROUS_SECONDS)
    ours.close()
    holding.join(GENEROUS_SECONDS)
    theirs.close()
    assert reply is not None
    return node.keeper._engines[plan.name], reply


def test_adapters_of_one_model_share_an_engine_that_is_not_the_models_own(
    start: Callable[..., Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    plans = [adapter_plan(node, tmp_path, name) for name in ("one", "other", "one")]
    for plan in plans:
        Path(plan.spec.adapter or "", "adapter_model.safetensors").touch()
    engines = [lease(node, plan)[0] for plan in plans]
    assert engines[0] is engines[1] is engines[2]
    assert node.warm("a") is not engines[0]
    (record,) = (r for r in node.records() if r.name == engines[0].plan.name)
    assert record.adapters == tuple(str(tmp_path / name) for name in ("one", "other"))
    assert record.context == node.plan("a").spec
    assert journal(tmp_path) == ["adapter:one", "adapter:other"]  # each loaded once
    node.keeper.update_demand({plan.spec.context_id: 3 for plan in plans})
    assert engines[0].record.demand == 6
    assert node.keeper.evict((plans[1].spec.context_id,)) == (engines[0].plan.name,)


def test_an_adapter_that_the_engine_refuses_is_reported_and_its_engine_stays(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start()
    plan = adapter_plan(node, tmp_path, "empty")
    managed, reply = lease(node, plan)
    assert f"the adapter {plan.spec.adapter} cannot be used with {plan.spec.model}" in reply.error
    assert "No adapter found" in reply.error
    assert managed.record.state == "warm"


def test_an_adapter_from_the_hub_that_does_not_fit_the_model_is_not_loaded(
    start: Callable[..., Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.managed_engine.fetch", lambda *_: tmp_path / "fetched")
    (tmp_path / "a").mkdir()
    write_safetensors(tmp_path / "a" / "model.safetensors", {"layers.0.q_proj.weight": (8, 8)})
    plan = adapter_plan(node, tmp_path, "fetched")
    spec = plan.spec.model_copy(update={"adapter": "org/adapter", "adapter_revision": "c0ffee"})
    weights = tmp_path / "fetched" / "adapter_model.safetensors"
    write_safetensors(weights, {"h.0.c_attn.lora_A.weight": (4, 8)})
    managed, reply = lease(node, plan.model_copy(update={"spec": spec}))
    assert "the adapter org/adapter cannot be used" in reply.error
    assert "the model has no module for h.0.c_attn" in reply.error
    assert managed.record.state == "warm" and not managed.record.adapters


def test_a_second_keeper_of_the_same_directory_is_refused(start: Callable[..., Node]) -> None:
    node = start()
    with pytest.raises(KeeperError, match=f"a keeper already, in {node.keeper.directory}"):
        Keeper(load_settings())


def test_equal_plans_have_one_engine_and_it_stays_when_all_let_go(
    start: Callable[..., Node],
) -> None:
    node = start()
    first = node.warm("a")
    second, found = node.keeper.attach(node.plan("a"))
    assert second is first and found == "warm"
    assert (first.record.attached, first.record.used) == (2, 2)
    first.detach()
    first.detach()
    (record,) = node.records()
    assert (record.state, record.attached) == ("warm", 0)
    assert process_of(first).is_running()


def test_a_start_that_nobody_waits_for_any_more_is_given_up(start: Callable[..., Node]) -> None:
    node = start(VLLM_TEST_START_SECONDS="600")
    managed = node.attach("a")
    node.comes(managed, "starting")
    managed.detach()
    assert not managed.attach()  # from the very moment on
    assert node.goes(managed) == "no worker waits for it any more"
    assert node.records() == ()


def test_a_broken_off_start_leaves_its_cache_marked_as_half_written(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start(VLLM_TEST_START_SECONDS="600")
    managed = node.attach("a")
    wait_until(lambda: managed.record.progress, "a word of the engine's")
    managed.stop("the test wants it")
    assert node.goes(managed) == "the test wants it"
    assert (tmp_path / "cache" / managed.plan.name / "unfinished").exists()


def test_a_full_disk_ends_no_engine_and_pins_none(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    node = start(KEEPWARM_CONTEXT_IDLE_SECONDS="0.5")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "replace", full)  # of what is remembered of the start
        managed = node.warm("a")
    managed.detach()
    assert node.goes(managed) == "no worker used it for 0.5 s"


def test_the_end_of_an_engine_is_reported_and_the_next_one_is_new(
    start: Callable[..., Node],
) -> None:
    node = start()
    managed = node.warm("a")
    process_of(managed).kill()
    assert node.goes(managed).startswith("it ended (exit code -9). It was killed (SIGKILL)")
    assert node.warm("a") is not managed


@pytest.mark.parametrize(
    ("last_words", "memory"), [("torch.OutOfMemoryError: CUDA out of memory.", True), ("", False)]
)
def test_a_worker_learns_whether_its_engine_ran_out_of_memory(
    start: Callable[..., Node], last_words: str, memory: bool
) -> None:
    node = start()
    managed = node.warm("a")
    Path(managed.record.log).write_text(f"{last_words}\n")
    process_of(managed).kill()
    node.goes(managed)
    ours, theirs = map(KeeperChannel, socket.socketpair())
    server = KeeperServer(node.keeper, until_idle=False)
    assert server._serve_lease(theirs, managed, "warm", managed.plan.spec)
    reply = ours.reply(GENEROUS_SECONDS)
    assert reply is not None and reply.error == managed.ended_because
    assert reply.out_of_memory is memory
    ours.close()
    theirs.close()


def test_an_engine_that_does_not_start_is_reported_with_its_log(start: Callable[..., Node]) -> None:
    node = start(VLLM_TEST_FAULT="no-start")
    said = node.goes(node.attach("a"))
    assert "it ended (exit code 3)" in said
    assert "  | RuntimeError: out of memory, says the test engine" in said


def test_an_engine_that_could_not_be_measured_counts_as_what_it_needs_and_that_is_not_remembered(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr(Engine, "memory_bytes", lambda _: None)
    monkeypatch.setattr("services.contexts.managed_engine.needed_bytes", lambda *_: 7)
    managed = node.idle("a")
    candidate = managed.candidate()
    assert candidate is not None and candidate.memory_bytes == 7
    past = node.keeper.caches.last_start(managed.plan.name)
    assert past is not None and past.memory_bytes is None and past.phases.total


# What it leaves on the node.


def test_what_a_killed_keeper_left_is_removed_but_for_the_logs_of_its_engines(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    left = tmp_path / "run" / "fork-server-00112233.tmp"
    (left / "kw-1").mkdir(parents=True)
    (tmp_path / "run" / "fork-server-00112233.log").write_text("imported")
    for suffix in ("sock", "log"):
        (tmp_path / "run" / f"ctx-0011-2233.{suffix}").touch()
    start()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "ctx-0011-2233.log",
        "keeper.lock",
    }


def test_old_caches_make_way_after_a_start_and_old_logs_are_bounded(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    old = tmp_path / "cache" / "ctx-00-11"
    old.mkdir(parents=True)
    (old / "kernel").write_bytes(b"x" * 10_000)
    for number in range(40):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"ctx-{number:02x}-11.log").touch()
    node = start(KEEPWARM_CACHE_GIB="0.000005")  # some 5,000 bytes
    managed = node.warm("a")
    wait_until(lambda: not old.exists(), "disk space for its cache")
    assert node.keeper.caches.last_start(managed.plan.name) is not None
    node.keeper.limit_logs()
    logs = list((tmp_path / "run").glob("ctx-*.log"))
    assert len(logs) == 33 and tmp_path / "run" / f"{managed.plan.name}.log" in logs


# Room.


def test_an_idle_engine_is_evicted_for_one_that_is_requested(start: Callable[..., Node]) -> None:
    node = start()
    idle = node.idle("a")
    process = process_of(idle)
    wanted = node.warm("b")
    assert node.goes(idle) == "its memory is needed for another context"
    assert not process.is_running()
    assert [record.name for record in node.records()] == [wanted.plan.name]


def test_an_engine_in_use_stays_and_a_request_waits_for_its_memory_until_it_is_released(
    start: Callable[..., Node],
) -> None:
    node = start()
    used = node.warm("a")
    process = process_of(used)
    waiting = node.attach("b")
    wait_until(lambda: waiting.record.progress, "a word of what it waits for")
    shown = {record.name: record for record in node.records()}[waiting.plan.name]
    assert shown.state == "waiting"
    assert shown.progress == "waiting for memory that engines in use hold"
    assert process.is_running() and used.record.state == "warm"
    used.detach()
    node.comes(waiting, "warm")
    assert not process.is_running()


def test_a_wait_for_memory_in_vain_names_the_setting_that_would_help(
    start: Callable[..., Node],
) -> None:
    node = start()
    used = node.warm("a")
    hurried = {"engine_start_timeout_seconds": 1.0}
    node.keeper.settings = node.keeper.settings.model_copy(update=hurried)
    said = node.goes(node.attach("b"))
    assert "engines that are in use hold them" in said
    assert "KEEPWARM_CONTEXT_MEMORY_GIB" in said
    assert process_of(used).is_running()


def test_a_request_that_is_given_up_while_it_waits_for_memory_starts_nothing(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start()
    used = node.warm("a")
    waiting = node.attach("b")
    wait_until(lambda: waiting.record.progress, "that it waits")
    waiting.detach()
    assert node.goes(waiting) == "no worker waits for it any more"
    assert not (tmp_path / "cache" / waiting.plan.name).exists()
    assert used.record.state == "warm"


def test_who_waits_behind_anothers_start_and_is_let_go_does_not_wait_for_its_end(
    start: Callable[..., Node],
) -> None:
    node = start(VLLM_TEST_START_SECONDS="600")
    node.comes(node.attach("a"), "starting")
    behind = node.attach("b")
    behind.detach()
    assert node.goes(behind) == "no worker waits for it any more"


def test_one_that_has_started_and_is_being_measured_holds_memory_already(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    measured = threading.Event()
    monkeypatch.setattr(Engine, "memory_bytes", lambda _: measured.wait(GENEROUS_SECONDS) and 1)
    first = node.attach("a")
    node.comes(first, "starting")  # it has its turn
    second = node.attach("b")
    wait_until(lambda: second.record.progress, "a word of what it waits for")
    assert (first.record.state, second.record.state) == ("starting", "waiting")
    measured.set()
    node.comes(first, "warm")
    first.detach()
    node.comes(second, "warm")


def test_the_budget_counts_and_not_what_is_free(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start(KEEPWARM_CONTEXT_MEMORY_GIB="0.001")
    monkeypatch.setattr("services.contexts.keeper.needed_bytes", lambda *_: 1)
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    idle = node.idle("a")
    assert (idle.record.memory_bytes or 0) > 2**20
    node.warm("b")
    assert node.goes(idle) == "its memory is needed for another context"


def test_without_a_budget_what_is_free_counts(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    first = node.idle("a")
    node.warm("b")
    assert first.record.state == "warm"


@pytest.mark.parametrize("wanted", ["a", "b"])
def test_the_context_that_claims_wait_for_stays_and_the_other_goes(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    node = start()
    with monkeypatch.context() as ample:
        ample.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
        engines = {name: node.idle(name) for name in ("a", "b")}
    for managed in engines.values():
        managed._start_seconds = 20.0  # equally dear but for the demand
    node.keeper.update_demand({node.plan(wanted).spec.context_id: 5})
    assert engines[wanted].record.demand == 5
    # There is memory for the third once one of the two has ended.
    monkeypatch.setattr(
        "services.contexts.keeper.free_bytes",
        lambda _: ALL_BYTES - (not any(managed.finished for managed in engines.values())),
    )
    third = node.warm("c")
    (other,) = {"a", "b"} - {wanted}
    assert node.goes(engines[other]) == "its memory is needed for another context"
    assert engines[wanted].record.state == third.record.state == "warm"


def test_demand_is_known_to_engines_that_come_after_it(start: Callable[..., Node]) -> None:
    node = start()
    node.keeper.update_demand({node.plan("a").spec.context_id: 3})
    assert node.attach("a").record.demand == 3
    node.keeper.update_demand({})
    assert node.attach("a").record.demand == 0


def test_an_engine_that_nobody_uses_for_long_is_stopped(start: Callable[..., Node]) -> None:
    node = start(KEEPWARM_CONTEXT_IDLE_SECONDS="0.5")
    assert node.goes(node.idle("a")) == "no worker used it for 0.5 s"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that nobody uses are asked all the time how they are."""
    monkeypatch.setattr("services.contexts.managed_engine._HANG_CHECK_SECONDS", 0.0)


@pytest.mark.usefixtures("hasty")
def test_an_engine_that_hangs_unused_is_ended_and_the_next_one_is_new(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    with monkeypatch.context() as silent:
        silent.setattr(Engine, "healthy", lambda _: False)
        managed = node.warm("a")
        process = process_of(managed)
        time.sleep(1)
        assert managed.record.state == "warm"  # its worker has a time-out of its own
        managed.detach()
        assert node.goes(managed) == "it hangs: it does not answer any more"
    assert not process.is_running()
    assert node.warm("a") is not managed


@pytest.mark.usefixtures("hasty")
def test_an_engine_that_answers_stays(start: Callable[..., Node]) -> None:
    managed = start().idle("a")
    assert managed._engine.healthy()
    time.sleep(1)
    assert managed.record.state == "warm"


def test_imports_that_need_not_be_done_again_make_no_engine_dear(
    start: Callable[..., Node],
) -> None:
    node = start()
    candidate = node.idle("a").candidate()
    (record,) = node.records()
    assert candidate is not None and record.phases is not None
    assert record.phases.total is not None and record.phases.imports is not None
    assert candidate.start_seconds <= record.phases.total - record.phases.imports + 0.001


def test_weights_that_need_not_be_fetched_again_make_no_engine_dear(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(managed: ManagedEngine) -> float:
        time.sleep(2)
        return 2.0

    node = start()
    node.idle("a")
    assert has_fork_server(node.keeper.directory)
    monkeypatch.setattr(ManagedEngine, "_fetch", fetch)
    candidate = node.idle("b").candidate()
    phases = {record.context.model[-1]: record.phases for record in node.records()}["b"]
    assert candidate is not None and phases is not None and phases.total is not None
    assert phases.fetch == 2.0 and phases.imports == 0 and phases.total >= 2
    assert candidate.start_seconds <= phases.total - 2 + 0.001


def test_a_start_that_waits_for_another_keepers_holds_nobody_up_and_can_be_stopped(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start()
    with EngineCaches(tmp_path / "cache").starting(node.plan("a").name):
        behind = node.attach("a")
        wait_until(lambda: "another keeper" in behind.record.progress, "that it waits")
        node.warm("b")  # on the same device
        behind.stop("the test wants it")
        assert node.goes(behind) == "the test wants it"


def test_a_start_goes_on_when_another_keepers_is_over(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start()
    with EngineCaches(tmp_path / "cache").starting(node.plan("a").name):
        behind = node.attach("a")
        wait_until(lambda: "another keeper" in behind.record.progress, "that it waits")
    node.comes(behind, "warm")


def test_a_wait_for_another_keeper_in_vain_names_its_lock(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS="1")
    name = node.plan("a").name
    with EngineCaches(tmp_path / "cache").starting(name):
        said = node.goes(node.attach("a"))
    assert f"starts the same engine, and has held {tmp_path}/cache/{name}.lock for 1 s" in said
    assert "KEEPWARM_CACHE_DIR of its own" in said


def test_weights_are_fetched_before_memory_is_taken_and_a_fetch_can_be_stopped(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_: ContextSpec, __: object, stopped: Callable[[], bool]) -> None:
        while not stopped():
            time.sleep(0.02)

    node = start()
    monkeypatch.setattr("services.contexts.managed_engine.fetch", fetch)
    plan = node.plan("a").model_copy(update={"spec": ContextSpec(model="org/large")})
    managed, _ = node.keeper.attach(plan)
    wait_until(lambda: managed.record.progress == "fetching weights", "that it fetches")
    assert managed.record.state == "waiting"
    node.warm("b")  # on the same device
    managed.detach()
    assert node.goes(managed) == "no worker waits for it any more"


def test_a_wait_that_is_too_long_names_what_is_waited_for(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start(VLLM_TEST_START_SECONDS="600")
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    node.comes(node.attach("a"), "starting")
    hurried = {"engine_start_timeout_seconds": 1.0}
    node.keeper.settings = node.keeper.settings.model_copy(update=hurried)
    said = node.goes(node.attach("b"))
    assert "its turn did not come within 1 s" in said and "contexts list" in said


def test_memory_counts_as_the_keeper_sees_it_and_not_as_its_worker_does(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: 3 * 2**30)
    assert node.attach("a").plan.device.memory_bytes == 3 * 2**30
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    assert node.attach("b").plan.device.memory_bytes == node.plan("b").device.memory_bytes


# Sleep.


def test_an_engine_that_can_sleep_frees_its_memory_and_lives(
    start: Callable[..., Node], sleepy: None, tmp_path: Path
) -> None:
    node = start()
    idle = node.idle("a")
    node.warm("b")
    assert idle.record.state == "asleep" and idle.ended_because is None
    assert process_of(idle).is_running()
    assert journal(tmp_path) == ["/sleep?level=1"]


def test_an_engine_that_sleeps_is_woken_for_the_next_request_once_memory_is_free(
    start: Callable[..., Node], sleepy: None, tmp_path: Path
) -> None:
    node = start()
    sleeper = node.idle("a")
    process = process_of(sleeper)
    other = node.warm("b")
    again, found = node.keeper.attach(node.plan("a"))
    assert again is sleeper and found == "asleep"
    wait_until(lambda: sleeper.record.progress, "that it waits for memory")
    assert sleeper.record.state == "asleep"
    other.detach()
    node.comes(sleeper, "warm")
    assert process.is_running() and process_of(sleeper) == process
    assert other.record.state == "asleep"
    assert journal(tmp_path) == ["/sleep?level=1", "/sleep?level=1", "/wake_up"]


def test_one_that_nobody_waits_for_any_more_sleeps_on_and_is_in_nobodys_way(
    start: Callable[..., Node], sleepy: None, tmp_path: Path
) -> None:
    node = start()
    sleeper = node.idle("a")
    used = node.warm("b")
    assert node.attach("a") is sleeper
    wait_until(lambda: sleeper.record.progress, "that it waits for memory")
    sleeper.detach()  # its worker dies
    wait_until(lambda: not sleeper.record.progress, "that it waits no more")
    next_one = node.attach("c")
    wait_until(lambda: next_one.record.progress, "that its turn has come")
    used.detach()
    node.comes(next_one, "warm")
    assert sleeper.record.state == "asleep" and sleeper.ended_because is None
    assert "/wake_up" not in journal(tmp_path)


def test_one_that_will_not_sleep_is_stopped(
    start: Callable[..., Node], sleepy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleepless(_: Engine) -> None:
        raise EngineRequestError("the engine refused /sleep")

    node = start()
    idle = node.idle("a")
    monkeypatch.setattr(Engine, "sleep", sleepless)
    node.warm("b")
    assert node.goes(idle) == "its memory is needed for another context"


def test_one_that_does_not_wake_is_gone_and_the_next_is_new(
    start: Callable[..., Node], sleepy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead_to_the_world(_: Engine) -> None:
        raise EngineRequestError("the engine refused /wake_up")

    node = start()
    sleeper = node.idle("a")
    node.idle("b")
    monkeypatch.setattr(Engine, "wake", dead_to_the_world)
    assert node.attach("a") is sleeper
    assert "it did not wake up: the engine refused /wake_up" in node.goes(sleeper)
    assert node.warm("a") is not sleeper


# An engine that answers otherwise than at its start.


def wrong_engines() -> float:
    (metric,) = WRONG_ENGINES.collect()
    return metric.samples[0].value


def test_one_that_wakes_wrong_is_ended_and_its_worker_has_a_new_one(
    start: Callable[..., Node], sleepy: None, tmp_path: Path
) -> None:
    node = start(VLLM_TEST_FAULT="wakes-wrong")
    sleeper = node.idle("a")
    node.idle("b")
    assert sleeper.record.state == "asleep"
    before = wrong_engines()
    managed, reply = lease(node, node.plan("a"))
    assert node.goes(sleeper) == "it does not answer as it did when it was started"
    assert managed is not sleeper and reply.error is None and reply.record is not None
    assert reply.record.state == "warm" and reply.record.pid != sleeper.record.pid
    assert not reply.warm and reply.record.phases is not None  # a start of the worker's own
    assert wrong_engines() == before + 1


def test_one_that_answers_otherwise_when_a_worker_comes_is_ended_and_the_worker_has_a_new_one(
    start: Callable[..., Node],
) -> None:
    node = start(VLLM_TEST_FAULT="drifts")
    first = node.warm("a")
    before = wrong_engines()
    _, reply = lease(node, node.plan("a"))
    assert node.goes(first) == "it does not answer as it did when it was started"
    assert reply.error is None and reply.record is not None
    assert reply.record.state == "warm" and reply.record.pid != first.record.pid
    assert wrong_engines() == before + 1


def test_one_that_does_not_answer_when_a_worker_comes_is_ended_too(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    first = node.idle("a")
    monkeypatch.setattr("services.contexts.engine._PROBE_SECONDS", 1.0)
    engine = process_of(first)
    engine.suspend()
    _, reply = lease(node, node.plan("a"))
    assert reply.record is not None and reply.record.pid != engine.pid
    assert node.goes(first) == "it does not answer as it did when it was started"


def test_an_engine_that_answers_as_before_is_shared_and_reported_as_warm(
    start: Callable[..., Node], sleepy: None
) -> None:
    node = start()
    first = node.idle("a")
    managed, reply = lease(node, node.plan("a"))
    assert managed is first and reply.warm
    node.idle("b")
    managed, reply = lease(node, node.plan("a"))
    assert managed is first and reply.record is not None and reply.record.state == "warm"


def test_what_sleepers_keep_is_given_up_where_it_is_missing(
    start: Callable[..., Node], sleepy: None, tmp_path: Path
) -> None:
    node = start()
    idle = node.idle("a")
    node.holds = ("starting", "warm", "asleep", "stopping")
    node.warm("b")
    assert journal(tmp_path) == ["/sleep?level=1"]
    assert node.goes(idle) == "its memory is needed for another context"


def test_of_sleepers_the_cheapest_to_lose_goes_and_no_more_than_are_needed(
    start: Callable[..., Node], sleepy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    sleepers = {name: node.idle(name) for name in ("a", "b")}
    node.idle("c").stop("the test wants it")  # only now the second one sleeps
    for managed in sleepers.values():
        assert managed.record.state == "asleep"
        managed._start_seconds = 20.0
    node.keeper.update_demand({node.plan("a").spec.context_id: 5})
    monkeypatch.setattr(
        "services.contexts.keeper.free_bytes",
        lambda _: ALL_BYTES - (not any(managed.finished for managed in sleepers.values())),
    )
    node.warm("d")
    assert node.goes(sleepers["b"]) == "its memory is needed for another context"
    assert sleepers["a"].record.state == "asleep"


def test_what_a_sleeper_keeps_counts_when_it_is_woken(
    start: Callable[..., Node], sleepy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    wanted, other = node.idle("a"), node.idle("b")
    node.idle("c").stop("the test wants it")
    kept = wanted.record.memory_bytes
    assert kept
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES - kept)
    assert node.warm("a") is wanted
    assert other.record.state == "asleep"


@pytest.mark.parametrize(("weights", "sleeps"), [(2, True), (4, False), (0, False)])
def test_one_sleeps_where_the_host_has_memory_for_its_weights_whatever_else_it_holds(
    start: Callable[..., Node],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: int,
    sleeps: bool,
) -> None:
    node = start()
    (tmp_path / "a").mkdir()
    if weights:  # else it is not known what would move
        with (tmp_path / "a" / "model.safetensors").open("wb") as file:
            file.truncate(weights * 2**30)
    gpu = Device("cuda", "H100", 80 * 2**30, (0,), gpu="0")
    managed = ManagedEngine(node.plan("a").model_copy(update={"device": gpu}), node.keeper, 0)
    managed.record = managed.record.model_copy(update={"memory_bytes": 70 * 2**30})
    monkeypatch.setattr("services.contexts.managed_engine.available_bytes", lambda: 3 * 2**30)
    assert managed._can_sleep() is sleeps


class Dozing:
    """An engine on its way to sleep, for as long as we like."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        sleep = Engine.sleep

        def slowly(engine: Engine) -> None:
            self.begun.set()
            assert self.goes_on.wait(GENEROUS_SECONDS)
            sleep(engine)

        monkeypatch.setattr(Engine, "sleep", slowly)


def test_who_attaches_while_it_falls_asleep_has_it_woken(
    start: Callable[..., Node], sleepy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    managed = node.idle("a")
    dozing = Dozing(monkeypatch)
    giving = threading.Thread(target=managed.free_memory)
    giving.start()
    assert dozing.begun.wait(GENEROUS_SECONDS)
    got: list[ManagedEngine] = []
    attaching = threading.Thread(target=lambda: got.append(node.attach("a")))
    attaching.start()
    attaching.join(0.3)
    assert not got  # nobody knows yet whether it stays
    dozing.goes_on.set()
    attaching.join(GENEROUS_SECONDS)
    assert got == [managed]
    node.comes(managed, "warm")
    giving.join()


def test_one_that_is_stopped_while_it_falls_asleep_is_never_called_asleep(
    start: Callable[..., Node], sleepy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    managed = node.idle("a")
    dozing = Dozing(monkeypatch)
    stopping, stopped = Engine.stop, threading.Event()

    def hold_back(engine: Engine) -> None:
        stopped.wait(GENEROUS_SECONDS)
        stopping(engine)

    monkeypatch.setattr(Engine, "stop", hold_back)
    giving = threading.Thread(target=managed.free_memory)
    giving.start()
    assert dozing.begun.wait(GENEROUS_SECONDS)
    managed.stop("it was evicted")
    dozing.goes_on.set()
    giving.join(GENEROUS_SECONDS)
    assert managed.record.state == "stopping" and not managed.attach()
    stopped.set()
    assert node.goes(managed) == "it was evicted"


def test_one_that_somebody_uses_again_does_not_give_way(
    start: Callable[..., Node], sleepy: None
) -> None:
    node = start()
    managed = node.warm("a")
    managed.free_memory()  # chosen while it was idle
    assert managed.record.state == "warm"


# The end.


class Endless:
    """Engines do not end for as long as we like."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over = threading.Event()
        stop = Engine.stop

        def hang(engine: Engine) -> None:
            assert self.over.wait(GENEROUS_SECONDS)
            stop(engine)

        monkeypatch.setattr(Engine, "stop", hang)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endless]:
    held = Endless(monkeypatch)
    yield held
    held.over.set()


def test_an_engine_that_does_not_end_is_not_waited_for_for_ever(
    start: Callable[..., Node], endless: Endless, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.contexts.keeper._STOPPING_SECONDS", 0.5)
    node = start()
    node.warm("a").stop("the test wants it")
    with pytest.raises(KeeperError, match=r"ending for 0.5 s.*its log is .*\.log.*evict --all"):
        node.attach("a")
    endless.over.set()


def test_a_lease_that_nobody_waits_for_any_more_is_not_waited_for(
    start: Callable[..., Node], endless: Endless
) -> None:
    node = start()
    managed = node.warm("a")
    managed.stop("the test wants it")
    ours, theirs = map(KeeperChannel, socket.socketpair())
    attaching = threading.Thread(
        target=lambda: KeeperServer(node.keeper, until_idle=False)._serve_connection(
            theirs._connection
        )
    )
    ours.send(Attach(plan=node.plan("a")))
    attaching.start()
    ours.close()  # its worker dies
    attaching.join(GENEROUS_SECONDS)
    assert not attaching.is_alive()
    endless.over.set()


def test_evicting_ends_what_is_named_by_itself_or_by_its_context_and_no_other(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    engines = {name: node.warm(name) for name in ("a", "b", "c")}
    named = (engines["a"].plan.name, engines["b"].plan.spec.context_id)
    assert sorted(node.keeper.evict(named)) == sorted(engines[x].plan.name for x in ("a", "b"))
    assert node.goes(engines["a"]) == node.goes(engines["b"]) == "it was evicted"
    assert engines["c"].record.state == "warm"


def test_an_engine_that_does_not_end_in_time_is_not_reported_as_ended(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start(KEEPWARM_GRACE_SECONDS="3")
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    engines = {name: node.warm(name) for name in ("a", "b", "c")}
    stop, over = Engine.stop, threading.Event()

    def slowly(engine: Engine) -> None:
        assert engine.plan is engines["b"].plan or over.wait(GENEROUS_SECONDS)
        stop(engine)

    monkeypatch.setattr(Engine, "stop", slowly)
    started = time.monotonic()
    assert node.keeper.evict(None) == (engines["b"].plan.name,)
    assert time.monotonic() - started < 6  # the grace period is for all of them together
    over.set()
    assert node.goes(engines["a"]) == "it was evicted"


def test_a_node_that_drains_starts_no_engine_and_gives_no_lease(
    start: Callable[..., Node],
) -> None:
    node = start()
    idle = node.idle("a")
    assert node.keeper.drain() == (idle.plan.name,)
    assert node.goes(idle) == "the node is draining"
    with pytest.raises(KeeperError, match="this node is draining"):
        node.attach("a")
    assert node.keeper.empty and node.records() == ()


def test_a_drain_waits_for_engines_in_use_and_refuses_requests_that_wait_for_memory(
    start: Callable[..., Node],
) -> None:
    node = start(KEEPWARM_GRACE_SECONDS="60")
    used = node.warm("a")
    waiting = node.attach("b")
    wait_until(lambda: waiting.record.progress, "that it waits")
    with ThreadPoolExecutor() as executor:
        draining = executor.submit(node.keeper.drain)
        assert node.goes(waiting) == "the node is draining"
        assert used.record.state == "warm" and not draining.done()
        used.detach()
        ended = draining.result(GENEROUS_SECONDS)
    assert used.ended_because == "the node is draining"
    assert ended == (used.plan.name, waiting.plan.name)


def test_a_drain_wakes_nobody_up(start: Callable[..., Node], sleepy: None) -> None:
    node = start(KEEPWARM_GRACE_SECONDS="60")
    sleeper = node.idle("a")
    used = node.warm("b")
    node.attach("a")
    draining = threading.Thread(target=node.keeper.drain)
    draining.start()
    assert node.goes(sleeper) == "the node is draining"
    assert used.record.state == "warm" and draining.is_alive()
    used.detach()
    draining.join(GENEROUS_SECONDS)


def test_a_drain_does_not_wait_for_ever(start: Callable[..., Node]) -> None:
    node = start(KEEPWARM_GRACE_SECONDS="2")
    used = node.warm("a")
    node.keeper.drain()
    assert node.goes(used) == "the node is draining"
    assert not node.records()


# What is told of it.


def test_requests_that_come_at_once_are_all_heard(start: Callable[..., Node]) -> None:
    node = start()
    managed = node.warm("a")
    bare, theirs = socket.socketpair()
    server = KeeperServer(node.keeper, until_idle=False)
    holding = threading.Thread(
        target=server._serve_lease, args=(KeeperChannel(theirs), managed, "warm", managed.plan.spec)
    )
    holding.start()
    context_id = managed.plan.spec.context_id
    said = [Demand(claims={context_id: claims}).model_dump_json() for claims in (3, 4, 5)]
    bare.sendall("".join(f"{channel}\n" for channel in said).encode())
    wait_until(lambda: managed.record.demand == 5, "the last of what was said")
    bare.close()
    holding.join(GENEROUS_SECONDS)
    theirs.close()


def told(node: Node, managed: ManagedEngine, found: State | None) -> KeeperReply:
    """What a worker hears that came to the engine so."""
    ours, theirs = map(KeeperChannel, socket.socketpair())
    server = KeeperServer(node.keeper, until_idle=False)
    holding = threading.Thread(
        target=server._serve_lease, args=(theirs, managed, found, managed.plan.spec)
    )
    holding.start()
    reply = ours.reply(GENEROUS_SECONDS)
    ours.close()
    holding.join(GENEROUS_SECONDS)
    theirs.close()
    assert reply is not None and reply.record is not None
    return reply


def test_the_phases_of_a_start_are_reported_to_its_requester_alone(
    start: Callable[..., Node],
) -> None:
    node = start(VLLM_TEST_START_SECONDS="1")
    managed, at_first = node.keeper.attach(node.plan("a"))
    node.comes(managed, "starting")
    _, meanwhile = node.keeper.attach(node.plan("a"))
    node.comes(managed, "warm")
    _, later = node.keeper.attach(node.plan("a"))
    replies = [told(node, managed, found) for found in (at_first, meanwhile, later)]
    assert [reply.record.phases is not None for reply in replies if reply.record] == [
        True,
        False,
        False,
    ]
    assert [reply.warm for reply in replies] == [False, False, True]


def test_a_wake_is_not_reported_as_a_start(start: Callable[..., Node], sleepy: None) -> None:
    node = start()
    sleeper = node.idle("a")
    node.idle("b")
    managed, found = node.keeper.attach(node.plan("a"))
    node.comes(managed, "warm")
    reply = told(node, sleeper, found)
    assert reply.record is not None and reply.record.phases is None and not reply.warm


def test_engines_are_listed_from_the_oldest_to_the_youngest_until_they_have_ended(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.keeper.free_bytes", lambda _: ALL_BYTES)
    assert node.records() == ()
    first, second = node.idle("a"), node.idle("b")
    first.stop("it was evicted")
    node.goes(first)
    again = node.idle("a")
    assert node.records() == (second.record, again.record)


def test_a_keeper_that_a_worker_starts_leaves_the_workers_port_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEEPWARM_METRICS_ADDRESS", "127.0.0.1:9464")
    assert keeper_client._environment(load_settings())["KEEPWARM_METRICS_ADDRESS"] == "off"


# A keeper that is a service of its own, perhaps in another container.


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeeperServer]:
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("KEEPWARM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KEEPWARM_START_KEEPER", "false")
    server = KeeperServer(Keeper(load_settings()), until_idle=False)
    serving = threading.Thread(target=server.serve)
    serving.start()
    yield server
    server.stop()
    serving.join(GENEROUS_SECONDS)


def test_a_keeper_that_drains_ends_though_nobody_waits_for_its_answer(
    service: KeeperServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = threading.Event()
    monkeypatch.setattr(service._keeper, "drain", lambda: left.wait(GENEROUS_SECONDS) and ())
    channel = keeper_client.open_keeper(load_settings())
    assert channel is not None
    channel.send(Drain())
    channel.close()
    left.set()
    wait_until(lambda: service.readiness_error, "its end")


@pytest.fixture
def listening(start: Callable[..., Node]) -> Iterator[Node]:
    """A keeper that takes connections."""
    node = start()
    server = KeeperServer(node.keeper, until_idle=False)

    def serve() -> None:
        while server._listen() == "removed":
            node.keeper.recreate_directory()

    serving = threading.Thread(target=serve)
    serving.start()
    wait_until(lambda: keeper_socket(node.keeper.directory).exists(), "its socket")
    yield node
    server.stop()
    serving.join(GENEROUS_SECONDS)


def test_who_asks_for_the_engines_sees_the_progress_of_a_start(
    listening: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = listening.keeper.directory
    assert engines(directory) == ()
    used = listening.warm("a")
    waiting = listening.attach("b")
    shown = wait_until(lambda: [r for r in engines(directory) if r.progress], "what b waits for")
    assert [(r.name, r.progress) for r in shown] == [
        (waiting.plan.name, "waiting for memory that engines in use hold")
    ]
    assert [r.state for r in engines(directory)] == ["warm", "waiting"]
    waiting.detach()
    used.detach()


def test_who_asks_for_the_engines_does_not_wait_for_an_eviction(
    listening: Node, endless: Endless
) -> None:
    directory = listening.keeper.directory
    managed = listening.warm("a")
    evicting = threading.Thread(target=listening.keeper.evict, args=(None,))
    evicting.start()
    wait_until(lambda: [r.state for r in engines(directory)] == ["stopping"], "its last state")
    assert not managed.finished
    endless.over.set()
    evicting.join(GENEROUS_SECONDS)
    wait_until(lambda: engines(directory) == (), "its end")


def test_when_its_directory_is_removed_no_engine_stays_that_cannot_be_reached(
    listening: Node,
) -> None:
    directory = listening.keeper.directory
    engine = listening.warm("a")
    process = process_of(engine)
    remove_at_once(directory)
    assert listening.goes(engine) == "its socket was removed"
    wait_until(lambda: not process.is_running(), "the end of the engine's process")
    wait_until(lambda: keeper_client.connect(directory), "an answer").close()
    with pytest.raises(KeeperError, match="has a keeper already"):
        Keeper(load_settings())
    assert listening.warm("a").record.pid != process.pid


@pytest.mark.parametrize("pattern", ["keeper.sock", "ctx-*.sock", "fork-server-*.sock"])
def test_a_socket_that_is_removed_is_made_again(listening: Node, pattern: str) -> None:
    directory = listening.keeper.directory
    engine = listening.warm("a")
    (socket_file,) = directory.glob(pattern)
    socket_file.unlink()
    if pattern == "ctx-*.sock":
        assert listening.goes(engine) == "its socket was removed"
    if pattern == "fork-server-*.sock":
        engine.stop("the test wants another")
        listening.goes(engine)
    wait_until(lambda: keeper_client.connect(directory), "an answer").close()
    assert listening.warm("a").record.pid is not None
    assert len(list(directory.glob(pattern))) == 1


def test_a_directory_that_another_keeper_has_by_now_is_left_to_it(
    start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    monkeypatch.setattr("services.contexts.keeper._LOCK_PAUSE_SECONDS", 0.001)
    remove_at_once(node.keeper.directory)
    other = Keeper(load_settings())
    with pytest.raises(KeeperError, match="has another keeper now"):
        node.keeper.recreate_directory()
    other.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """What the keeper sees, and this process does not."""
    device = Device("cuda", "H100", 2**36, (0, 1), gpu="0")
    monkeypatch.setattr("services.contexts.keeper_server.find_device", lambda: device)
    return device


@pytest.mark.usefixtures("service")
def test_a_worker_has_the_device_that_its_keeper_sees(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert keeper_client.node_device(load_settings()) == gpu
    assert keeper_client.node_device(load_settings(start_keeper=True)).kind == "cpu"


@pytest.mark.usefixtures("service")
def test_a_keeper_reports_why_it_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Device:
        raise EngineStartError("there is no GPU '7' here")

    monkeypatch.setattr("services.contexts.keeper_server.find_device", missing)
    with pytest.raises(EngineStartError, match="there is no GPU '7' here"):
        keeper_client.node_device(load_settings())


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No keeper, and none to be started."""
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("KEEPWARM_START_KEEPER", "false")
    monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(keeper_client, "_start", lambda *_: pytest.fail("it was started"))


@pytest.mark.usefixtures("alone")
def test_a_worker_that_may_start_no_keeper_reports_what_is_missing() -> None:
    with pytest.raises(KeeperError, match="KEEPWARM_START_KEEPER=false"):
        keeper_client.open_keeper(load_settings())


@pytest.mark.usefixtures("alone")
def test_a_worker_that_is_stopped_waits_for_no_keeper() -> None:
    assert keeper_client.open_keeper(load_settings(), lambda: True) is None
