"""The counters of runs, written with what they count, against a count of all rows."""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from sqlalchemy import select, update

from services.contracts import Run, load_settings
from services.store import (
    Store,
    build_report,
    dead_claims,
    find_run,
    reopen_dead,
    run_status,
    run_statuses,
)
from services.store.schema import deliveries, verdict_counts
from tests.older_stores import downgrade
from tests.run_counts import (
    assert_counters_are_those_of_the_rows,
    operations,
    recounted,
    stored,
)

Opener = Callable[..., Store]


def counts(store: Store) -> list[tuple[object, ...]]:
    with store.transaction() as connection:
        return sorted(tuple(row) for row in connection.execute(select(verdict_counts)))


def test_verdicts_are_counted_by_label_and_by_whether_they_are_right(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(),
            make.batch(
                make.verdict(0, "A", gold="A"), make.verdict(1, "A"), make.verdict(2, "C", gold="A")
            ),
            make.batch(make.verdict(3, "A", gold="A"), make.verdict(4, "INVALID", gold="A")),
            make.dead(5),
        )
    )
    status = run_status(store, run.run_id)
    assert status is not None
    assert status.verdicts == {"A": 3, "B B": 0, "C": 1, "INVALID": 1}
    assert (status.judged, status.correct) == (4, 2)


def test_they_equal_what_the_report_counts(store: Store, make: SimpleNamespace, run: Run) -> None:
    verdicts = [make.verdict(n, "ABC"[n % 3] if n % 3 != 1 else "B B", gold="A") for n in range(9)]
    store.write(make.incoming(make.announced(claims=9), make.batch(*verdicts)))
    report = build_report(store, find_run(store, run.run_id))
    assert report.quality is not None
    assert report.status.verdicts == report.verdicts
    assert (report.status.judged, report.status.correct) == (9, report.quality.correct) == (9, 3)


@given(operations=operations)
def test_whatever_happens_to_a_run_its_counters_are_those_of_its_rows(
    operations: list[tuple[Any, ...]],
    make: SimpleNamespace,
    run: Run,
    other_run: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    at = load_settings(store_url=str(tmp_path_factory.mktemp("counts") / "s.sqlite"))
    assert_counters_are_those_of_the_rows(at, make, [run, other_run], operations)


def test_a_removed_verdict_and_a_revived_claim_are_uncounted(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.dead(0), make.dead(1), make.dead(2)))
    store.write(make.incoming(make.batch(make.verdict(0), make.verdict(9), attempt=2)))
    store.write(make.incoming(make.dead(1)))
    reopen_dead(store, dead_claims(store, None, ["c2"]))
    assert store.remove_foreign(run.run_id, map(make.claim, range(3))) == ["c9"]
    status = run_status(store, run.run_id)
    assert status is not None
    assert (status.done, status.dead, status.lost_work) == (1, 1, 1)
    assert stored(store) == recounted(store, Counter())


def test_a_large_batch_of_which_a_part_came_before_is_counted_once(
    store: Store, make: SimpleNamespace
) -> None:
    store.write(make.incoming(make.batch(*(make.verdict(n, "C") for n in range(0, 1_020, 3)))))
    store.write(make.incoming(make.batch(*(make.verdict(n, "A") for n in range(1_020)))))
    assert [row[1:] for row in counts(store)] == [("A", 680, 0, 0), ("C", 340, 0, 0)]


def test_collectors_that_share_a_store_count_together(
    open_store: Opener, make: SimpleNamespace, other_run: Run
) -> None:
    def write(number: int) -> None:
        store = open_store()
        for batch in range(5):
            first = number * 100 + batch * 10
            store.write(
                make.incoming(
                    make.batch(*(make.verdict(first + n, "A") for n in range(10))),
                    make.batch(*(make.verdict(n, "C") for n in range(10)), of=other_run),
                )
            )

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert sorted(row[1:] for row in counts(open_store())) == [("A", 150, 0, 0), ("C", 10, 0, 0)]


@pytest.mark.parametrize("version", [2, 3, 5, 6, 7])
def test_a_store_of_before_is_counted_once_when_it_is_opened(
    version: int, open_store: Opener, make: SimpleNamespace
) -> None:
    before = open_store()
    verdicts = (make.verdict(0, gold="A"), make.verdict(1, "C"))
    before.write(make.incoming(make.announced(), make.batch(*verdicts), make.dead(2)))
    before.write(make.incoming(make.batch(make.verdict(0), attempt=2), make.returned(3)))
    expected = stored(before)
    with before.transaction() as connection:
        downgrade(connection, version)
    before.close()
    with ThreadPoolExecutor(4) as pool:
        store, *_ = pool.map(lambda _: open_store(), range(4))
    digest = {key for key in expected if key[1] in ("high", "low")}
    if version < 6:  # not known until a producer announces one to compare with
        expected |= dict.fromkeys(digest)
    assert stored(store) == expected and len(expected) == 11


def test_a_store_that_version_6_wrote_has_the_same_statuses(
    open_store: Opener, tmp_path: Path
) -> None:
    directory = Path(__file__).parent
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.executescript((directory / "version_6.sql").read_text())
    store = open_store()
    statuses = [status.model_dump() for status in run_statuses(store)]
    assert statuses == json.loads((directory / "version_6.json").read_text())
    known = Counter({find_run(store, "run-60").run_id: 1})
    assert stored(store) == recounted(store, known)


def test_gold_labels_that_come_later_are_counted(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    verdicts = [make.verdict(0, "A"), make.verdict(1, "A", gold="C"), make.verdict(2, "C")]
    store.write(make.incoming(make.announced(), make.batch(*verdicts), make.dead(3)))
    golds = {"c0": "A", "c1": None, "c2": "A", "c3": "C", "unknown": "A"}
    assert store.set_gold(run.run_id, golds) == 4
    status = run_status(store, run.run_id)
    assert status is not None
    assert (status.judged, status.correct) == (2, 1)
    assert stored(store) == recounted(store, Counter())
    assert store.set_gold(run.run_id, golds) == 0


def test_a_status_of_a_large_run_reads_no_more_than_that_of_a_small_one(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    def steps() -> int:
        """Of SQLite's virtual machine, for one status."""
        with store.transaction() as connection:
            database: Any = connection.connection.dbapi_connection
        taken: list[None] = []
        database.set_progress_handler(lambda: taken.append(None), 10)
        assert run_status(store, run.run_id) is not None
        database.set_progress_handler(None, 0)
        return len(taken)

    def grow(first: int, last: int) -> None:
        batches = [
            make.batch(*(make.verdict(2 * n + m) for m in range(2))) for n in range(first, last)
        ]
        dead = (make.dead(10_000 + n) for n in range(first, last))
        store.write(make.incoming(*batches, *dead))
        with store.transaction() as connection:  # the claims of the last minute count
            connection.execute(update(deliveries).values(received_at=first))
        store.write(make.incoming(make.batch(make.verdict(20_000 + first))))

    store.write(make.incoming(make.announced(claims=100_000)))
    grow(0, 1_000)
    small = steps()
    grow(1_000, 4_000)
    assert steps() < 1.1 * small
