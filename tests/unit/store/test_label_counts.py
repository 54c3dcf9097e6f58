"""Verdicts by label, counted as they are written, against a count of all outcomes."""

import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select

from services.contracts import Run
from services.store import Store, build_report, find_run, run_status
from services.store.label_counts import count_all
from services.store.schema import verdict_counts

Opener = Callable[..., Store]


def counts(store: Store) -> list[tuple[object, ...]]:
    with store.transaction() as connection:
        return sorted(tuple(row) for row in connection.execute(select(verdict_counts)))


def anew(store: Store) -> list[tuple[object, ...]]:
    """As a look at every outcome has them."""
    with store.transaction() as connection:
        connection.execute(delete(verdict_counts))
        count_all(connection)
    return counts(store)


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


def test_they_say_what_the_report_says(store: Store, make: SimpleNamespace, run: Run) -> None:
    verdicts = [make.verdict(n, "ABC"[n % 3] if n % 3 != 1 else "B B", gold="A") for n in range(9)]
    store.write(make.incoming(make.announced(claims=9), make.batch(*verdicts)))
    report = build_report(store, find_run(store, run.run_id))
    assert report.quality is not None
    assert report.status.verdicts == report.verdicts
    assert (report.status.judged, report.status.correct) == (9, report.quality.correct) == (9, 3)


# What may come: a claim by its number, with a label; or its death.
messages = st.lists(
    st.one_of(
        st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from(["A", "C", "INVALID"])),
            min_size=1,
            max_size=4,
        ),
        st.integers(0, 5),
    ),
    max_size=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(transactions=st.lists(messages, max_size=4))
def test_whatever_comes_twice_is_counted_once(
    transactions: Sequence[Sequence[int | list[tuple[int, str]]]],
    open_store: Opener,
    make: SimpleNamespace,
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path / f"{abs(hash(repr(transactions)))}.sqlite")
    for transaction in transactions:
        store.write(
            make.incoming(
                *(
                    make.dead(message)
                    if isinstance(message, int)
                    # The gold label is the claim's own.
                    else make.batch(
                        *(
                            make.verdict(n, label, gold="A" if n % 2 else None)
                            for n, label in message
                        )
                    )
                    for message in transaction
                )
            )
        )
    kept = counts(store)
    assert kept == anew(store)
    store.close()


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


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_of_before_is_counted_once_when_it_is_opened(
    version: int, open_store: Opener, make: SimpleNamespace, tmp_path: Path
) -> None:
    before = open_store()
    before.write(
        make.incoming(make.batch(make.verdict(0, gold="A"), make.verdict(1, "C")), make.dead(2))
    )
    expected = counts(before)
    before.close()
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("DROP TABLE verdict_counts")
        database.execute("ALTER TABLE runs DROP COLUMN input")
        database.execute("UPDATE keepwarm_schema SET version = ?", (version,))
    with ThreadPoolExecutor(4) as pool:
        store, *_ = pool.map(lambda _: open_store(), range(4))
    assert counts(store) == expected and len(expected) == 2


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
    assert counts(store) == anew(store)
    assert store.set_gold(run.run_id, golds) == 0


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.dictionaries(st.integers(0, 4).map("c{}".format), st.sampled_from([None, "A", "C"])),
        max_size=4,
    )
)
def test_whatever_gold_labels_come_the_counts_are_those_of_the_outcomes(
    changes: list[dict[str, str | None]], store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(*(make.verdict(n, "AC"[n % 2]) for n in range(5)))))
    for golds in changes:
        store.set_gold(run.run_id, golds)
    assert counts(store) == anew(store)
