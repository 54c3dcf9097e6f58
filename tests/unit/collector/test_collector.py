"""What the collector does with deliveries; that they come is shown on a real broker."""

import json
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.broker import Delivery
from services.collector import Collector, Incoming, Store, run_status
from services.contracts import Run, encode, load_settings, topology
from services.contracts.wire import Message

QUEUES = {
    "VerdictBatch": topology.VERDICTS_QUEUE,
    "RunAnnouncement": topology.RUNS_QUEUE,
    "DeadClaim": topology.DEAD_CLAIMS_QUEUE,
}


class Deliveries:
    """Stands for a consumer: hands out what it has, and remembers what became of it."""

    def __init__(self, *messages: Message | tuple[str, bytes]) -> None:
        self._waiting: list[Delivery] = []
        self.acknowledged: list[int] = []
        self.refused: list[int] = []
        for tag, message in enumerate(messages, 1):
            if isinstance(message, tuple):
                queue, body = message
            else:
                queue, body = QUEUES[type(message).__name__], encode(message)
            self._waiting.append(Delivery(queue, body, {}, str(tag), False, tag, 1))
        self.on_acknowledge: Callable[[], None] = lambda: None

    def take(self, timeout_seconds: float) -> Delivery | None:
        assert timeout_seconds > 0
        return self._waiting.pop(0) if self._waiting else None

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        self.on_acknowledge()
        self.acknowledged += [delivery.tag for delivery in deliveries]

    def refuse(self, deliveries: Iterable[Delivery]) -> None:
        self.refused += [delivery.tag for delivery in deliveries]


def collect(
    store: Store,
    consumer: Deliveries,
    on_commit: Callable[[Incoming], None] = lambda _: None,
    **settings: object,
) -> Collector:
    collector = Collector(store, load_settings(**{"store_commit_seconds": 0.01, **settings}))
    collector._collect_once(consumer, on_commit)  # type: ignore[arg-type]
    return collector


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


def test_whoever_asked_hears_of_each_commit(store: Store, make: SimpleNamespace) -> None:
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


def test_whether_anything_came_is_told(store: Store, make: SimpleNamespace) -> None:
    collector = Collector(store, load_settings(store_commit_seconds=0.01))
    consumer = Deliveries(make.announced())
    heard: list[Incoming] = []
    took = [collector._collect_once(consumer, heard.append) for _ in range(2)]  # type: ignore[arg-type]
    assert took == [True, False]


@pytest.mark.parametrize("queue", QUEUES.values())
@pytest.mark.parametrize("body", [b"", b"nonsense", b"{}"])
def test_what_is_no_message_is_refused_and_the_rest_is_stored(
    queue: str, body: bytes, store: Store, make: SimpleNamespace, run: Run
) -> None:
    consumer = Deliveries(make.batch(make.verdict(0)), (queue, body), make.dead(1))
    collect(store, consumer)
    assert (consumer.acknowledged, consumer.refused) == ([1, 3], [2])
    assert store.finished(run.run_id, ["c0", "c1"]) == {"c0", "c1"}


def test_a_message_of_another_queues_kind_is_refused(store: Store, make: SimpleNamespace) -> None:
    consumer = Deliveries((topology.RUNS_QUEUE, encode(make.batch(make.verdict(0)))))
    collect(store, consumer)
    assert (consumer.acknowledged, consumer.refused) == ([], [1])


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

    def failing_twice(incoming: Incoming) -> None:
        try:
            write(incoming)
        except Exception:
            failures.append(len(consumer.acknowledged))
            if len(failures) == 2:
                with closing(sqlite3.connect(database)) as connection, connection:
                    connection.execute("ALTER TABLE hidden RENAME TO outcomes")
            raise

    monkeypatch.setattr(store, "write", failing_twice)
    collect(store, consumer)
    assert failures == [0, 0]
    assert consumer.acknowledged == [1]


def test_told_to_stop_while_the_store_fails_it_acknowledges_nothing(
    store: Store, make: SimpleNamespace, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as connection, connection:
        connection.execute("DROP TABLE outcomes")
    consumer = Deliveries(make.batch(make.verdict(0)))
    collector = Collector(store, load_settings(store_commit_seconds=0.01))
    heard: list[Incoming] = []
    write = store.write

    def stopping(incoming: Incoming) -> None:
        collector.stop()
        write(incoming)

    store.write = stopping  # type: ignore[method-assign]
    collector._collect_once(consumer, heard.append)  # type: ignore[arg-type]
    assert (consumer.acknowledged, heard) == ([], [])
