"""The collector as a process: commits before it acknowledges, on SQLite and on PostgreSQL."""

import json
import resource
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from services.broker import BrokerAddress, Consumer, Outgoing, PrivateNode, Publisher
from services.collector import Collector
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextDemand,
    ContextReady,
    ContextSpec,
    ControlUpdate,
    PromptSpec,
    Run,
    RunAnnouncement,
    Settings,
    StartupPhases,
    WorkerHeartbeat,
    decode,
    encode,
    load_settings,
    topology,
)
from services.models.files import pin_model
from services.store import Store, run_status
from tests.conftest import REPOSITORY
from tests.integration.conftest import (
    PATIENCE,
    Command,
    messages_in,
    wait_for_messages,
    wait_until,
)
from tests.integration.postgres import PostgreSQL
from tests.integration.runs import end_well
from tests.proxy import Proxy

Start = Callable[..., Command]
CLAIMS = str(REPOSITORY / "samples" / "claims.jsonl")


@pytest.fixture
def answered(command: Start, node: PrivateNode, broker) -> str:
    """A run whose verdicts all wait at the broker."""
    submitting = command("submit", CLAIMS, "--batch-size", "8", KEEPWARM_STORE_URL="")
    assert submitting.wait() == 0, submitting.output
    worker = command("worker")
    wait_for_messages(node, topology.VERDICTS_QUEUE, 31, "30 batches and a start")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    return submitting.lines[-1].strip()


def the_run(command: Start, **variables: str) -> dict:
    status = command("status", "--json", **variables)
    assert status.wait() == 0, status.output
    (run,) = json.loads(status.output)
    return run


def test_a_collector_that_is_killed_loses_and_doubles_nothing(
    command: Start, answered: str, node: PrivateNode, environment: dict[str, str]
) -> None:
    # A transaction is committed every two verdicts: the kill lands among them.
    killed = command("collect", KEEPWARM_STORE_COMMIT_VERDICTS="2")
    killed.said("store.committed")
    killed.signal(signal.SIGKILL)
    killed.wait()
    collecting = command("collect", "--until", answered)
    assert collecting.wait() == 0
    run = the_run(command)
    assert (run["total"], run["done"], run["complete"]) == (240, 240, True)
    wait_for_messages(node, topology.VERDICTS_QUEUE, 0, "all acknowledged")


def test_until_ends_at_once_when_the_run_is_complete(command: Start, answered: str) -> None:
    assert command("collect", "--until", answered).wait() == 0
    assert command("collect", "--until", answered).wait() == 0


def test_a_store_that_cannot_be_written_is_named(command: Start, tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").mkdir()
    collecting = command("collect")
    assert collecting.wait() == 6
    assert str(tmp_path / "store.sqlite") in collecting.output


def test_a_locked_store_is_waited_for_and_nothing_is_lost(
    command: Start, answered: str, node: PrivateNode, environment: dict[str, str]
) -> None:
    Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"])).close()
    with closing(sqlite3.connect(environment["KEEPWARM_STORE_URL"])) as other:
        other.execute("BEGIN IMMEDIATE")
        collecting = command("collect", "--until", answered)
        collecting.said("broker.connected")
        # All verdicts are in its hands, and none can be written.
        wait_for_messages(node, topology.VERDICTS_QUEUE, 0, "all taken")
        assert collecting.process.poll() is None
        other.rollback()
    assert collecting.wait() == 0
    assert the_run(command)["done"] == 240


MIB = 1024 * 1024


def test_returned_batches_of_any_number_and_size_are_sent_on_within_a_gibibyte_of_memory(
    command: Start, node: PrivateNode, address: BrokerAddress, environment: dict[str, str]
) -> None:
    context = pin_model(ContextSpec(model=environment["KEEPWARM_MODEL"]))
    run = Run(source="f", source_digest="d", context=context, prompt=PromptSpec())
    claims = tuple(
        Claim(claim_id=f"b0000-{n}", position=n, text=f"Claim {n}.", evidence="Łódź, so. " * 80)
        for n in range(1_000)
    )
    batch = encode(ClaimBatch(run=run, submission_id="sub-1", batch_id="b0000", claims=claims))
    assert MIB < len(batch) < 1.2 * MIB
    announced = RunAnnouncement(run=run, submission_id="sub-1")
    Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"])).close()
    with closing(sqlite3.connect(environment["KEEPWARM_STORE_URL"])) as other:
        other.execute("BEGIN IMMEDIATE")  # until all that it takes ahead is in its hands
        collecting = command("collect")
        resource.prlimit(collecting.process.pid, resource.RLIMIT_AS, (1024 * MIB, 1024 * MIB))
        collecting.said("broker.connected", times=2)
        with Publisher(address, "test", window=16).open(PATIENCE) as publisher:
            publisher.publish(Outgoing.of(announced, topology.RUNS_EXCHANGE, topology.RUNS_QUEUE))
            for number in range(600):
                publisher.publish(
                    Outgoing(
                        topology.RETURNS_EXCHANGE,
                        topology.RETURNS_QUEUE,
                        batch.replace(b"b0000", b"b%04d" % number),
                        message_id=f"b{number}",
                        kind="ClaimBatch",
                    )
                )
            publisher.flush(PATIENCE)
        other.rollback()
    queue = topology.claims_queue(context.context_id)
    wait_for_messages(node, queue, 600, "all sent on")
    end_well(collecting)
    assert messages_in(node, topology.RETURNS_QUEUE) == 0
    assert messages_in(node, topology.DEAD_MESSAGES_QUEUE) == 0


class Listener:
    """Hears what every worker hears."""

    def __init__(self) -> None:
        self.notices: list[ControlUpdate] = []

    def hear(self, body: bytes) -> None:
        self.notices.append(decode(ControlUpdate, body))

    def hears(self, *, ready: int | None, warm: int) -> ContextDemand:
        def heard() -> ContextDemand | None:
            for line in self.notices[-1].contexts if self.notices else ():
                if line.workers_warm == warm and ready in (None, line.claims_ready):
                    return line
            return None

        return wait_until(heard, f"{ready} claims ready and {warm} workers in the directory")


@pytest.fixture
def listener(address: BrokerAddress) -> Iterator[Listener]:
    listening = Listener()
    with Consumer(
        address, "test", queues=[], prefetch=1, on_fanout_message=listening.hear, listener="test"
    ).open(PATIENCE):
        yield listening


def report(address: BrokerAddress, context: ContextSpec, state: str = "serving") -> None:
    """As a worker says it."""
    word = WorkerHeartbeat(
        worker_id="node-1",
        context_id=context.context_id,
        device="Tesla T4",
        state=state,
        claims_per_second=None,
    )
    with Publisher(address, "test", window=1).open(PATIENCE) as publisher:
        publisher.publish(Outgoing.of(word, topology.HEARTBEATS_EXCHANGE, ""))
        publisher.flush(PATIENCE)


def test_every_listener_hears_which_contexts_have_claims_and_workers(
    command: Start, listener: Listener, address: BrokerAddress, environment: dict[str, str]
) -> None:
    submitting = command("submit", CLAIMS, "--batch-size", "8", KEEPWARM_STORE_URL="")
    assert submitting.wait() == 0, submitting.output
    collecting = command("collect")
    waiting = listener.hears(ready=240, warm=0)
    assert waiting.context.model == environment["KEEPWARM_MODEL"]
    # Another collector, which knows nothing but the store and the broker, says the same.
    collecting.signal(signal.SIGKILL)
    collecting.wait()
    listener.notices.clear()
    command("collect")
    assert listener.hears(ready=240, warm=0) == waiting
    command("worker", VLLM_TEST_CLAIM_SECONDS="0.1")
    some = listener.hears(ready=None, warm=1)
    assert max(some.claims_ready, some.claims_in_flight) <= 240
    assert some.context == waiting.context


def changes(said: list[WorkerHeartbeat]) -> list[tuple[str, str | None]]:
    """State and ending, without what it says again every few seconds."""
    return [told for told, _ in groupby((word.state, word.ending) for word in said)]


def test_a_worker_is_known_from_its_heartbeats(
    command: Start, address: BrokerAddress, broker: Settings
) -> None:
    said: list[WorkerHeartbeat] = []
    with Consumer(
        address,
        "test",
        queues=[],
        prefetch=1,
        on_fanout_message=lambda body: said.append(decode(WorkerHeartbeat, body)),
        listener="test",
        fanout_exchange=topology.HEARTBEATS_EXCHANGE,
    ).open(PATIENCE):
        worker = command("worker")
        begun = [("starting", None), ("serving", None)]
        wait_until(lambda: changes(said) == begun, "its first words")
        end_well(worker)
        all_of_it = [*begun, ("draining", "SIGTERM"), ("stopped", "SIGTERM")]
        wait_until(lambda: changes(said) == all_of_it, "its last word")
    assert len({(word.worker_id, word.context_id) for word in said}) == 1
    assert all(word.host and word.metrics_address for word in said)


@contextmanager
def collecting_here(settings: Settings) -> Iterator[Collector]:
    """A collector in this process, where a test can change what it waits for."""
    store = Store.open(settings)
    collector = Collector(store, settings)
    thread = threading.Thread(target=collector.run)
    thread.start()
    try:
        yield collector
    finally:
        collector.stop()
        thread.join(PATIENCE)
        store.close()
    assert not thread.is_alive()


def test_a_report_puts_a_worker_into_the_next_notice_and_its_silence_takes_it_away(
    command: Start,
    node: PrivateNode,
    broker: Settings,
    listener: Listener,
    address: BrokerAddress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.fleet.HEARTBEAT_SECONDS", 0.5)
    submitting = command("submit", CLAIMS, "--batch-size", "8", KEEPWARM_STORE_URL="")
    assert submitting.wait() == 0, submitting.output
    with collecting_here(broker.model_copy(update={"store_url": str(tmp_path / "here.sqlite")})):
        waiting = listener.hears(ready=240, warm=0)
        report(address, waiting.context)
        assert listener.hears(ready=240, warm=1).context == waiting.context
        report(address, waiting.context, state="stopped")
        listener.hears(ready=240, warm=0)
        report(address, waiting.context, state="starting")
        report(address, waiting.context)
        listener.hears(ready=240, warm=1)
        monkeypatch.setattr("services.collector.fleet.HEARTBEAT_TIMEOUT_SECONDS", 1.0)
        listener.hears(ready=240, warm=0)


def test_a_workers_start_is_in_the_report_once_however_often_its_message_comes(
    command: Start, node: PrivateNode, address: BrokerAddress, small_model: Path
) -> None:
    submitting = command("submit", CLAIMS, KEEPWARM_STORE_URL="")
    assert submitting.wait() == 0, submitting.output
    run_id = submitting.lines[-1].strip()
    collecting = command("collect")
    wait_for_messages(node, topology.RUNS_QUEUE, 0, "the run's announcement taken")
    ready = ContextReady(
        startup_id="start-1",
        worker_id="node-1",
        context_id=pin_model(ContextSpec(model=str(small_model))).context_id,
        device="Tesla T4",
        warm=False,
        seconds=61.5,
        phases=StartupPhases(load=9.5, total=60.0),
    )
    attached = ready.model_copy(update={"startup_id": "start-2", "warm": True, "seconds": 0.5})
    with Publisher(address, "test", window=10).open(PATIENCE) as publisher:
        for message in (ready, ready, attached):
            publisher.publish(
                Outgoing.of(message, topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE)
            )
        publisher.flush(PATIENCE)

    def all_told() -> dict | None:
        report = command("report", run_id, "--json")
        if report.wait() != 0:  # its announcement is not committed yet
            return None
        startups = json.loads(report.output)["startups"]
        return startups if startups and startups["warm"] else None

    startups = wait_until(all_told, "the last of the three in the report")
    assert startups["warm"] == {"count": 1, "median_seconds": 0.5}
    (cold,) = startups["cold"]
    assert (cold["device"], cold["count"], cold["longest_seconds"]) == ("Tesla T4", 1, 61.5)
    assert (cold["phases"]["load"], cold["phases"]["compile"]) == (9.5, None)
    end_well(collecting)


def test_postgresql_holds_a_run_as_sqlite_does(
    command: Start, answered: str, postgresql: PostgreSQL
) -> None:
    variables = {"KEEPWARM_STORE_URL": postgresql.new_database()}
    collecting = command("collect", "--until", answered, **variables)
    assert collecting.wait() == 0, collecting.output
    run = the_run(command, **variables)
    assert (run["run_id"], run["total"], run["done"], run["complete"]) == (
        answered,
        240,
        240,
        True,
    )
    report = command("report", answered, "--json", **variables)
    assert report.wait() == 0, report.output
    assert json.loads(report.output)["quality"]["labelled"] == 240
    again = command("submit", CLAIMS, **variables)
    assert again.wait() == 0, again.output


def test_a_collector_that_is_to_finish_waits_for_a_connection_that_it_lost(
    command: Start, answered: str, node: PrivateNode, broker: Settings, tmp_path: Path
) -> None:
    """`keepwarm run` ends so: verdicts would be left at the broker, and the run incomplete."""
    with Proxy(node.port) as proxy, held_store(tmp_path) as store:
        settings = broker.model_copy(
            update={
                "broker_url": f"amqp://keepwarm@127.0.0.1:{proxy.port}/",
                "store_commit_verdicts": 8,  # a batch's: most are not in the store when it is lost
            }
        )
        collector = Collector(store, settings)
        lost = threading.Event()

        def lose(_: object) -> None:
            if not lost.is_set():
                lost.set()
                proxy.black_hole()
                proxy.cut()

        collecting = threading.Thread(target=collector.run, args=(lose,))
        collecting.start()
        assert lost.wait(PATIENCE)
        collector.finish()
        collecting.join(3)
        assert collecting.is_alive()
        proxy.heal()
        collecting.join(PATIENCE)
        assert not collecting.is_alive()
        status = run_status(store, answered)
        assert status is not None and status.complete


def test_a_collector_that_is_to_finish_does_not_wait_for_ever(
    broker: Settings, node: PrivateNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.collector.collector._FINISH_SECONDS", 1.0)
    with Proxy(node.port) as proxy, held_store(tmp_path) as store:
        settings = broker.model_copy(
            update={"broker_url": f"amqp://keepwarm@127.0.0.1:{proxy.port}/"}
        )
        collector = Collector(store, settings)
        collecting = threading.Thread(target=collector.run)
        collecting.start()
        wait_until(lambda: collector.readiness_error is None, "its connections")
        proxy.black_hole()
        proxy.cut()
        collector.finish()
        collecting.join(PATIENCE)
        assert not collecting.is_alive()


@contextmanager
def held_store(directory: Path) -> Iterator[Store]:
    store = Store.open(load_settings(store_url=str(directory / "own.sqlite")))
    try:
        yield store
    finally:
        store.close()
