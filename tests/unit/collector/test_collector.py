"""What the collector does with deliveries; that they come is shown on a real broker."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import select

from services.broker import Counts, Delivery, Outgoing
from services.collector import Collector
from services.contracts import (
    ClaimBatch,
    ControlUpdate,
    Run,
    decode,
    encode,
    load_settings,
    topology,
)
from services.contracts.errors import StoreError, StoreRefused
from services.contracts.wire import Message
from services.store import Incoming, Store, find_run, run_status
from services.store.schema import startups

QUEUES = {
    "VerdictBatch": topology.VERDICTS_QUEUE,
    "RunAnnouncement": topology.RUNS_QUEUE,
    "DeadClaim": topology.DEAD_CLAIMS_QUEUE,
    "ClaimBatch": topology.RETURNS_QUEUE,
    "ContextReady": topology.VERDICTS_QUEUE,
    "WorkerReport": topology.VERDICTS_QUEUE,
}
KINDS = {
    queue: kind
    for kind, queue in reversed(QUEUES.items())  # what a queue is named after
}


class Deliveries:
    """Stands for a consumer: hands out what it has, and remembers what became of it."""

    def __init__(
        self, *messages: Message | tuple[str, bytes], headers: dict[str, object] | None = None
    ) -> None:
        self._waiting: list[Delivery] = []
        self.acknowledged: list[int] = []
        self.given_back: list[int] = []
        for tag, message in enumerate(messages, 1):
            if isinstance(message, tuple):
                queue, body = message
                kind = KINDS[queue]
            else:
                kind = message.wire_type
                queue, body = QUEUES[kind], encode(message)
            self._waiting.append(
                Delivery(queue, body, headers or {}, f"m-{tag}", False, tag, 1, kind=kind)
            )
        self.on_acknowledge: Callable[[], None] = lambda: None

    def take(self, timeout_seconds: float) -> Delivery | None:
        assert timeout_seconds > 0
        return self._waiting.pop(0) if self._waiting else None

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        self.on_acknowledge()
        self.acknowledged += [delivery.tag for delivery in deliveries]

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        self.given_back += [delivery.tag for delivery in deliveries]

    def request_counts(self, queues: Sequence[str], heard: Callable[[Counts], None]) -> None:
        heard(dict.fromkeys(queues, 2))


class RecordingPublisher:
    """Confirms when the test says so."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []
        self.declared: list[str] = []
        self.pending = 0

    def also_declare(self, context_id: str) -> None:
        self.declared.append(context_id)

    def publish(self, message: Outgoing) -> None:
        self.messages.append(message)

    def confirm(self) -> None:
        for message in self.messages:
            if message.on_confirmed is not None:
                message.on_confirmed()


@pytest.fixture
def store(store: Store, make: SimpleNamespace) -> Store:
    """It knows the run of `make`, for of others nothing is taken."""
    store.write(make.incoming(make.announced()))
    return store


@pytest.fixture
def publisher() -> RecordingPublisher:
    return RecordingPublisher()


def collect_once(
    collector: Collector,
    consumer: Deliveries,
    publisher: RecordingPublisher,
    on_commit: Callable[[Incoming], None] = lambda _: None,
) -> bool:
    return collector._collect_once(consumer, publisher, on_commit)  # type: ignore[arg-type]


def collect(
    store: Store,
    consumer: Deliveries,
    on_commit: Callable[[Incoming], None] = lambda _: None,
    publisher: RecordingPublisher | None = None,
    **settings: object,
) -> Collector:
    collector = Collector(store, load_settings(**{"store_commit_seconds": 60, **settings}))
    collect_once(collector, consumer, publisher or RecordingPublisher(), on_commit)
    return collector


def refused(publisher: RecordingPublisher) -> list[tuple[str, bytes]]:
    """Where what was set aside as unusable came from, and its body."""
    return [
        (message.headers[topology.ORIGIN_HEADER], message.body)
        for message in publisher.messages
        if message.routing_key == topology.DEAD_MESSAGES_QUEUE
    ]


def test_what_came_is_stored_and_then_acknowledged(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    consumer = Deliveries(
        make.announced(claims=3), make.batch(make.verdict(0), make.verdict(1)), make.dead(2)
    )
    seen: list[tuple[int, int]] = []

    def look() -> None:
        status = run_status(store, run.run_id)
        assert status is not None
        seen.append((status.done, status.dead))

    consumer.on_acknowledge = look
    collect(store, consumer)
    assert consumer.acknowledged == [1, 2, 3]
    assert seen == [(2, 1)]


def test_on_commit_is_called_for_each_commit(store: Store, make: SimpleNamespace) -> None:
    heard: list[int] = []
    collect(
        store,
        Deliveries(make.batch(make.verdict(0), make.verdict(1)), make.dead(2)),
        lambda incoming: heard.append(len(incoming)),
    )
    assert heard == [3]


def test_when_nothing_came_nothing_is_committed(store: Store) -> None:
    heard: list[Incoming] = []
    consumer = Deliveries()
    collect(store, consumer, heard.append)
    assert (heard, consumer.acknowledged) == ([], [])


def test_collect_once_returns_whether_a_message_came(store: Store, make: SimpleNamespace) -> None:
    collector = Collector(store, load_settings(store_commit_seconds=60))
    consumer = Deliveries(make.announced())
    heard: list[Incoming] = []
    publisher = RecordingPublisher()
    took = [collect_once(collector, consumer, publisher, heard.append) for _ in range(2)]
    assert took == [True, False]


@pytest.mark.parametrize("queue", QUEUES.values())
@pytest.mark.parametrize("body", [b"", b"nonsense", b"{}"])
def test_what_is_no_message_is_refused_and_the_rest_is_stored(
    queue: str,
    body: bytes,
    store: Store,
    make: SimpleNamespace,
    run: Run,
    publisher: RecordingPublisher,
) -> None:
    consumer = Deliveries(make.batch(make.verdict(0)), (queue, body), make.dead(1))
    collect(store, consumer, publisher=publisher)
    assert refused(publisher) == [(queue, body)]
    assert consumer.acknowledged == [1, 3]
    publisher.confirm()
    assert consumer.acknowledged == [1, 3, 2]
    assert store.finished(run.run_id, ["c0", "c1"]) == {"c0", "c1"}


def test_a_message_of_another_queues_kind_is_refused(
    store: Store, make: SimpleNamespace, publisher: RecordingPublisher
) -> None:
    body = encode(make.batch(make.verdict(0)))
    consumer = Deliveries((topology.RUNS_QUEUE, body))
    collect(store, consumer, publisher=publisher)
    assert refused(publisher) == [(topology.RUNS_QUEUE, body)]
    assert consumer.acknowledged == []


def test_a_workers_startup_is_stored_and_acknowledged(
    store: Store, make: SimpleNamespace, publisher: RecordingPublisher
) -> None:
    consumer = Deliveries(make.ready("start-1"), make.batch(make.verdict(0)))
    heard: list[Incoming] = []
    collect(store, consumer, heard.append, publisher)
    assert consumer.acknowledged == [1, 2]
    assert [ready.startup_id for incoming in heard for ready in incoming.startups] == ["start-1"]
    with store.transaction() as connection:
        (told,) = connection.execute(select(startups)).all()
    assert (told.startup_id, told.warm, told.seconds) == ("start-1", False, 60.0)


def test_a_startup_is_accepted_only_on_the_verdicts_queue(
    make: SimpleNamespace, store: Store, publisher: RecordingPublisher
) -> None:
    body = encode(make.ready("start-1"))
    collect(store, Deliveries((topology.RUNS_QUEUE, body)), publisher=publisher)
    assert refused(publisher) == [(topology.RUNS_QUEUE, body)]


def test_what_a_worker_reports_is_noted_and_what_is_no_report_changes_nothing(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    collector = Collector(store, load_settings())
    collector._on_heartbeat(encode(make.report("a")))
    collector._on_heartbeat(encode(make.report("b")))
    collector._on_heartbeat(encode(make.report("b")).replace(b'"serving"', b'"asleep"'))
    collector._on_heartbeat(b"nonsense")
    assert collector._fleet.workers_on(run.context.context_id) == 2
    collector._on_heartbeat(encode(make.report("b", state="stopped")))
    assert collector._fleet.workers_on(run.context.context_id) == 1


def test_a_report_among_verdicts_is_refused(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    collector = collect(store, Deliveries(make.report("a")), publisher=publisher)
    assert refused(publisher) == [(topology.VERDICTS_QUEUE, encode(make.report("a")))]
    assert collector._fleet.workers_on(run.context.context_id) == 0


def test_what_is_refused_goes_aside_with_its_reason(
    store: Store, make: SimpleNamespace, publisher: RecordingPublisher
) -> None:
    collect(store, Deliveries((topology.VERDICTS_QUEUE, b"{}")), publisher=publisher)
    (message,) = publisher.messages
    assert (message.exchange, message.message_id) == (topology.DEAD_EXCHANGE, "m-1")
    assert message.kind == "VerdictBatch"
    reason = message.headers[topology.REASON_HEADER]
    assert reason.startswith("not a VerdictBatch: run_id: Field required")


def test_a_transaction_ends_at_its_number_of_verdicts(store: Store, make: SimpleNamespace) -> None:
    batches = [make.batch(make.verdict(2 * b), make.verdict(2 * b + 1)) for b in range(5)]
    consumer = Deliveries(*batches)
    collect(store, consumer, store_commit_verdicts=3, store_commit_seconds=60)
    assert consumer.acknowledged == [1, 2]


def test_a_transaction_has_at_most_half_of_what_the_broker_sends_ahead(
    store: Store, make: SimpleNamespace
) -> None:
    consumer = Deliveries(*(make.announced() for _ in range(600)))
    collect(store, consumer, store_commit_seconds=60)
    assert consumer.acknowledged == list(range(1, 257))


@pytest.mark.parametrize(
    "poison",
    [{"position": 2**63}, {"position": 10**30}, {"probabilities": (0.5, 0.5)}],
    ids=["position over 63 bits", "position of any size", "a probability too few"],
)
def test_no_message_that_decodes_can_stop_the_collector(
    poison: dict[str, object], store: Store, make: SimpleNamespace, run: Run
) -> None:
    good = make.batch(make.verdict(0))
    body = make.batch(make.verdict(1)).model_dump(mode="json")
    body["verdicts"][0].update(poison)
    bad = (topology.VERDICTS_QUEUE, json.dumps(body).encode())
    consumer = Deliveries(good, bad)
    collect(store, consumer)
    assert 1 in consumer.acknowledged
    assert store.finished(run.run_id, ["c0"]) == {"c0"}


def test_a_store_that_fails_is_waited_for_and_nothing_is_acknowledged_meanwhile(
    store: Store, make: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.collector.collector._LONGEST_PAUSE_SECONDS", 0.01)
    database = tmp_path / "store.sqlite"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("ALTER TABLE outcomes RENAME TO hidden")
    consumer = Deliveries(make.batch(make.verdict(0)))
    failures: list[int] = []
    write = store.write

    def waiting() -> float | None:
        return REGISTRY.get_sample_value("keepwarm_store_waiting")

    def failing_twice(incoming: Incoming) -> Counter[str]:
        try:
            return write(incoming)
        except Exception:
            failures.append(len(consumer.acknowledged))
            if len(failures) == 2:
                assert waiting() == 1
                with closing(sqlite3.connect(database)) as connection, connection:
                    connection.execute("ALTER TABLE hidden RENAME TO outcomes")
            raise

    monkeypatch.setattr(store, "write", failing_twice)
    collect(store, consumer)
    assert failures == [0, 0]
    assert consumer.acknowledged == [1]
    assert waiting() == 0


def test_stopped_while_the_store_fails_it_acknowledges_nothing(
    store: Store, make: SimpleNamespace, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as connection, connection:
        connection.execute("DROP TABLE outcomes")
    consumer = Deliveries(make.batch(make.verdict(0)))
    collector = Collector(store, load_settings(store_commit_seconds=60))
    heard: list[Incoming] = []
    write = store.write

    def stopping(incoming: Incoming) -> None:
        collector.stop()
        write(incoming)

    store.write = stopping  # type: ignore[method-assign]
    publisher = RecordingPublisher()
    collect_once(collector, consumer, publisher, heard.append)
    assert (consumer.acknowledged, heard, publisher.messages) == ([], [], [])


def refuse_claims(database: Path, *claim_ids: str) -> None:
    """As a constraint of a site's own would."""
    wrong = ", ".join(f"'{claim_id}'" for claim_id in claim_ids)
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER site BEFORE INSERT ON outcomes WHEN NEW.claim_id IN "
            f"({wrong}) BEGIN SELECT RAISE(ABORT, 'not here'); END"
        )


def test_a_message_that_the_store_refuses_is_set_aside_and_all_others_are_stored(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher, tmp_path: Path
) -> None:
    refuse_claims(tmp_path / "store.sqlite", "c3", "c8")
    messages = [make.batch(make.verdict(number)) for number in range(10)]
    consumer = Deliveries(make.announced(claims=11), *messages, make.dead(10), make.returned(8))
    heard: list[int] = []
    collect(store, consumer, lambda incoming: heard.append(len(incoming)), publisher)
    wrong = [messages[3], messages[8]]
    assert refused(publisher) == [(topology.VERDICTS_QUEUE, encode(each)) for each in wrong]
    for message in publisher.messages:
        if message.routing_key == topology.DEAD_MESSAGES_QUEUE:
            assert message.headers[topology.REASON_HEADER].endswith("refuses a value: not here")
    ids = [f"c{number}" for number in range(11)]
    assert store.finished(run.run_id, ids) == {*ids} - {"c3", "c8"}
    assert sum(heard) == 9
    # The return among them is sent on, once.
    assert [m.exchange for m in publisher.messages].count(topology.CLAIMS_EXCHANGE) == 1
    publisher.confirm()
    assert sorted(consumer.acknowledged) == list(range(1, 14))


def refuse_everything(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER site BEFORE INSERT ON outcomes BEGIN SELECT RAISE(ABORT, 'no'); END"
        )


def accept_everything(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DROP TRIGGER site")


def test_a_store_that_refuses_every_outcome_is_waited_for_and_no_message_is_set_aside(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    publisher: RecordingPublisher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.collector._LONGEST_PAUSE_SECONDS", 0.01)
    refuse_everything(tmp_path / "store.sqlite")
    batches = [make.batch(make.verdict(number)) for number in range(5)]
    # What goes into other tables is stored, and shows nothing about outcomes.
    consumer = Deliveries(batches[0], make.announced(claims=5), *batches[1:], make.ready("start"))
    collector = collect(store, consumer, publisher=publisher)
    for _ in range(3):
        assert (publisher.messages, sorted(consumer.acknowledged)) == ([], [2, 7])
        assert "5 messages in a row were refused" in str(collector.waiting_for)
        assert "refuses a value: no" in str(collector.waiting_for)
        collect_once(collector, consumer, publisher)
    accept_everything(tmp_path / "store.sqlite")
    collect_once(collector, consumer, publisher)
    assert sorted(consumer.acknowledged) == list(range(1, 8))
    assert (publisher.messages, collector.waiting_for) == ([], None)
    assert len(store.finished(run.run_id, [f"c{number}" for number in range(5)])) == 5


def test_of_a_store_that_refuses_every_outcome_few_messages_are_kept_until_one_is_accepted(
    store: Store,
    make: SimpleNamespace,
    publisher: RecordingPublisher,
    tmp_path: Path,
) -> None:
    refuse_claims(tmp_path / "store.sqlite", "c0")
    bad = make.batch(make.verdict(0))
    collector = collect(store, Deliveries(bad), publisher=publisher)
    collect_once(collector, Deliveries(), publisher)
    assert (publisher.messages, collector.waiting_for) == ([], None)
    consumer = Deliveries(make.batch(make.verdict(1)))
    collect_once(collector, consumer, publisher)
    assert refused(publisher) == [(topology.VERDICTS_QUEUE, encode(bad))]
    assert consumer.acknowledged == [1]


def test_the_last_message_is_set_aside_after_a_while_if_the_store_refuses_it(
    store: Store,
    make: SimpleNamespace,
    publisher: RecordingPublisher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.collector._KEEP_REFUSED_SECONDS", 0.0)
    refuse_claims(tmp_path / "store.sqlite", "c0")
    bad = make.batch(make.verdict(0))
    collect(store, Deliveries(bad), publisher=publisher)
    assert refused(publisher) == [(topology.VERDICTS_QUEUE, encode(bad))]


def test_when_it_finishes_while_the_store_refuses_everything_the_messages_stay_at_the_broker(
    store: Store,
    make: SimpleNamespace,
    publisher: RecordingPublisher,
    tmp_path: Path,
) -> None:
    refuse_everything(tmp_path / "store.sqlite")
    consumer = Deliveries(*(make.batch(make.verdict(number)) for number in range(5)))
    collector = Collector(store, load_settings(store_commit_seconds=60))
    collector.finish()
    assert [collect_once(collector, consumer, publisher) for _ in range(2)] == [True, False]
    assert (consumer.acknowledged, publisher.messages) == ([], [])


def test_a_return_that_the_store_refuses_to_look_up_is_set_aside(
    store: Store,
    make: SimpleNamespace,
    publisher: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(*_: object) -> None:
        raise StoreRefused("the store refuses a value: NUL")

    monkeypatch.setattr(store, "is_active", refusing)
    batch = make.returned(1)
    consumer = Deliveries(make.announced(claims=3), batch)
    collect(store, consumer, publisher=publisher)
    assert refused(publisher) == [(topology.RETURNS_QUEUE, encode(batch))]
    assert consumer.given_back == []


@pytest.mark.parametrize("kind", ["returned", "dead"])
def test_a_transaction_ends_at_its_number_of_bytes(
    kind: str, store: Store, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.collector.collector._COMMIT_BYTES", 2_000)
    taken = []
    consumer = Deliveries(*(getattr(make, kind)(number) for number in range(20)))
    take = consumer.take

    def counting(timeout_seconds: float) -> Delivery | None:
        delivery = take(timeout_seconds)
        taken.append(0 if delivery is None else len(delivery.body))
        return delivery

    monkeypatch.setattr(consumer, "take", counting)
    collect(store, consumer)
    assert sum(taken[:-1]) < 2_000 <= sum(taken)


# What workers give back.


def test_what_a_worker_gives_back_is_counted_and_goes_onto_its_claims_queue_again(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    batch = make.returned(1, 2, 3)
    consumer = Deliveries(make.announced(claims=9), batch)
    collect(store, consumer, publisher=publisher)
    status = run_status(store, run.run_id)
    assert status is not None and status.returned == 3
    (message,) = publisher.messages
    queue = topology.claims_queue(run.context.context_id)
    assert (message.exchange, message.routing_key) == (topology.CLAIMS_EXCHANGE, queue)
    assert decode(ClaimBatch, message.body) == batch
    assert consumer.acknowledged == [1]
    publisher.confirm()
    assert consumer.acknowledged == [1, 2]


def test_an_outcome_that_comes_with_the_return_is_not_asked_for_again(
    store: Store, make: SimpleNamespace, publisher: RecordingPublisher
) -> None:
    consumer = Deliveries(
        make.returned(1, 2, 3), make.announced(claims=3), make.batch(make.verdict(1)), make.dead(3)
    )
    collect(store, consumer, publisher=publisher)
    (message,) = publisher.messages
    assert [claim.claim_id for claim in decode(ClaimBatch, message.body).claims] == ["c2"]


def test_claims_of_a_submission_that_nobody_announced_are_refused(
    store: Store,
    make: SimpleNamespace,
    publisher: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.collector._ANNOUNCEMENT_SECONDS", 0.0)
    forged = make.returned(1, submission_id="sub-forged")
    consumer = Deliveries(make.announced(claims=3), forged)
    collect(store, consumer, publisher=publisher)
    assert refused(publisher) == [(topology.RETURNS_QUEUE, encode(forged))]
    assert consumer.acknowledged == [1]


def test_what_overtakes_its_announcement_waits_for_it(
    store: Store, make: SimpleNamespace, other_run: Run, publisher: RecordingPublisher
) -> None:
    consumer = Deliveries(
        make.returned(1, of=other_run),
        make.batch(make.verdict(2), of=other_run),
        make.dead(3, of=other_run),
    )
    collector = collect(store, consumer, publisher=publisher)
    assert (publisher.messages, consumer.acknowledged) == ([], [])
    assert run_status(store, other_run.run_id) is None
    store.write(make.incoming(make.announced(claims=3, of=other_run)))
    for _ in range(2):
        collector._retry_unannounced()
        collect_once(collector, consumer, publisher)
    assert [message.exchange for message in publisher.messages] == [topology.CLAIMS_EXCHANGE]
    assert consumer.acknowledged == [2, 3]
    status = run_status(store, other_run.run_id)
    assert status is not None and (status.done, status.dead, status.returned) == (1, 1, 1)


def test_what_nobody_announces_in_time_is_refused_and_makes_no_run(
    store: Store,
    make: SimpleNamespace,
    other_run: Run,
    publisher: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forged = make.batch(make.verdict(2), of=other_run)
    consumer = Deliveries(forged)
    collector = collect(store, consumer, publisher=publisher)
    monkeypatch.setattr("time.monotonic", lambda now=time.monotonic: now() + 31)
    collector._retry_unannounced()
    collect_once(collector, consumer, publisher)
    assert refused(publisher) == [(topology.VERDICTS_QUEUE, encode(forged))]
    assert run_status(store, other_run.run_id) is None


def test_only_so_much_waits_for_an_announcement(
    store: Store,
    make: SimpleNamespace,
    other_run: Run,
    publisher: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.collector._MAX_UNANNOUNCED", 2)
    some = [make.batch(make.verdict(number), of=other_run) for number in range(5)]
    collect(store, Deliveries(*some), publisher=publisher)
    assert len(refused(publisher)) == 3


def test_a_message_that_is_newer_is_left_to_newer_ones_and_what_came_before_it_is_stored(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    newer = encode(make.batch(make.verdict(1))).replace(
        b'"schema_version":1', b'"schema_version":9'
    )
    consumer = Deliveries(
        make.batch(make.verdict(0)), (topology.VERDICTS_QUEUE, newer), make.batch(make.verdict(2))
    )
    collector = collect(store, consumer, publisher=publisher)
    assert (consumer.acknowledged, publisher.messages) == ([1], [])
    assert store.finished(run.run_id, ["c0", "c1", "c2"]) == {"c0"}
    assert collector._too_new is not None and collector._too_new[0].tag == 2


def test_a_return_with_a_count_of_failures_that_is_none_is_refused(
    store: Store, make: SimpleNamespace, publisher: RecordingPublisher
) -> None:
    batch = make.returned(1)
    store.write(make.incoming(make.announced(claims=3)))
    consumer = Deliveries(batch, headers={topology.FAILURES_HEADER: "many"})
    collect(store, consumer, publisher=publisher)
    assert refused(publisher) == [(topology.RETURNS_QUEUE, encode(batch))]


def test_a_return_is_requeued_while_the_store_fails(
    store: Store,
    make: SimpleNamespace,
    publisher: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(store, "is_active", failing)
    consumer = Deliveries(make.announced(claims=3), make.returned(1))
    collect(store, consumer, publisher=publisher)
    assert (consumer.acknowledged, consumer.given_back) == ([1], [2])
    assert publisher.messages == []


# What it tells workers.


def give_notice(collector: Collector, publisher: RecordingPublisher) -> list[tuple[str, ...]]:
    publisher.messages.clear()
    collector._control_update_due = 0.0
    collector._send_control_update(publisher)  # type: ignore[arg-type]
    for message in publisher.messages:
        assert (message.exchange, message.transient) == (topology.CONTROL_EXCHANGE, True)
    return [decode(ControlUpdate, message.body).cancelled for message in publisher.messages]


def test_cancelled_submissions_are_sent_to_workers_repeatedly(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    collector = Collector(store, load_settings())
    assert give_notice(collector, publisher) == []
    store.cancel(find_run(store, run.run_id).run_key)
    cancelled = (f"sub-{run.run_id}",)
    assert [give_notice(collector, publisher) for _ in range(2)] == [[cancelled]] * 2


def test_runs_are_read_for_the_gauges_from_time_to_time_and_kept_while_the_store_fails(
    store: Store, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector(store, load_settings())

    def done() -> list[int]:
        collector._read_runs()
        return [status.done for status in collector._runs.statuses]

    def failing(*_: object) -> None:
        raise StoreError("it is locked")

    assert done() == [0]
    store.write(make.incoming(make.batch(make.verdict(0))))
    assert done() == [0]
    collector._runs_due = 0.0
    assert done() == [1]
    read_at = collector._runs.read_at
    monkeypatch.setattr(store, "transaction", failing)
    collector._runs_due = 0.0
    assert done() == [1] and collector._runs.read_at == read_at


@pytest.mark.parametrize(("seconds", "notices"), [(600.0, 1), (0.0, 3)])
def test_notices_are_not_due_all_the_time(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    publisher: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    notices: int,
) -> None:
    monkeypatch.setattr("services.collector.collector.CONTROL_UPDATE_SECONDS", seconds)
    store.write(make.incoming(make.announced()))
    store.cancel(find_run(store, run.run_id).run_key)
    collector = Collector(store, load_settings())
    for _ in range(3):
        collector._send_control_update(publisher)  # type: ignore[arg-type]
    assert len(publisher.messages) == notices


@pytest.mark.usefixtures("no_worker_is_waited_for")
def test_notices_to_many_workers_go_less_often(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    store.write(make.incoming(make.announced(claims=300)))
    store.cancel(find_run(store, run.run_id).run_key)
    collector = Collector(store, load_settings())
    for number in range(20_000):
        collector._fleet.note(make.report(f"node-{number}"))
    began = time.monotonic()
    assert give_notice(collector, publisher)
    sent = len(publisher.messages[0].body) * 20_000
    assert sent / (collector._control_update_due - began) < 2_000_000
    for number in range(20_000):
        collector._fleet.note(make.report(f"node-{number}", state="stopped"))
    assert give_notice(collector, publisher)
    assert collector._control_update_due - time.monotonic() <= 2.0


def test_no_notice_is_added_to_what_a_broker_does_not_take_for_the_moment(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    store.write(make.incoming(make.announced()))
    store.cancel(find_run(store, run.run_id).run_key)
    publisher.pending = 1
    assert give_notice(Collector(store, load_settings()), publisher) == []


def test_a_store_that_fails_to_list_cancellations_does_not_end_the_collector(
    store: Store, tmp_path: Path, publisher: RecordingPublisher
) -> None:
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as connection, connection:
        connection.execute("DROP TABLE submissions")
    assert give_notice(Collector(store, load_settings()), publisher) == []


@pytest.fixture
def no_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.collector.fleet.HEARTBEAT_SECONDS", 0.0)


@pytest.mark.usefixtures("no_worker_is_waited_for")
def test_demand_is_sent_to_workers_as_soon_as_the_broker_counted_the_queues(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    store.write(make.incoming(make.announced(claims=300), make.batch(make.verdict(0))))
    collector = Collector(store, load_settings(batch_size=100))
    assert give_notice(collector, publisher) == []
    collector._demand.request_counts(Deliveries())  # type: ignore[arg-type]
    collector._on_heartbeat(encode(make.report("node-1")))
    assert give_notice(collector, publisher) == [()]
    (line,) = decode(ControlUpdate, publisher.messages[0].body).contexts
    assert (line.context, line.claims_ready, line.workers_warm) == (run.context, 2, 1)


@pytest.mark.usefixtures("no_worker_is_waited_for")
def test_the_last_control_update_is_empty(
    store: Store, make: SimpleNamespace, run: Run, publisher: RecordingPublisher
) -> None:
    store.write(make.incoming(make.announced()))
    collector = Collector(store, load_settings())
    give_notice(collector, publisher)
    collector._demand.request_counts(Deliveries())  # type: ignore[arg-type]
    assert give_notice(collector, publisher) == [()]
    collector._demand._counts = {}
    assert [give_notice(collector, publisher) for _ in range(2)] == [[()], []]
