import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.contracts import ContextSpec, PromptSpec, Run
from services.contracts.errors import StoreError
from services.store import RunStatus, Store, find_run, run_status, run_statuses


def status_of(store: Store, run: Run) -> RunStatus:
    status = run_status(store, run.run_id)
    assert status is not None
    return status


@pytest.fixture
def received(tmp_path: Path) -> Callable[[dict[str, float]], None]:
    """Says when each batch came, in seconds."""

    def set_times(times: dict[str, float]) -> None:
        with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
            for batch_id, seconds in times.items():
                database.execute(
                    "UPDATE deliveries SET received_at = ? WHERE batch_id = ?",
                    (1e9 + seconds, batch_id),
                )

    return set_times


def test_an_unknown_run_has_no_status(store: Store) -> None:
    assert run_status(store, "run-none") is None
    assert run_statuses(store) == []


def test_a_run_that_has_begun_has_no_total_yet(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced()))
    assert status_of(store, run) == RunStatus(
        run_id=run.run_id,
        source="claims.jsonl",
        model="models/small",
        context_id=run.context.context_id,
        prompt="abc",
        total=None,
        done=0,
        dead=0,
        rejected=None,
        repeated=None,
        duplicates=0,
        returned=0,
        lost_work=0,
        verdicts={"A": 0, "B B": 0, "C": 0, "INVALID": 0},
        judged=0,
        correct=0,
        claims_per_second=0.0,
        eta_seconds=None,
        workers_seen=0,
        complete=False,
        cancelled=False,
    )


def test_verdicts_may_come_before_the_run_is_announced(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1))))
    status = status_of(store, run)
    assert (status.source, status.model, status.total) == (None, None, None)
    assert (status.done, status.complete) == (1, False)


def test_counts_are_of_claims_and_a_worker_counts_once(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=10, repeated=3, rejected=2),
            make.batch(make.verdict(0), make.verdict(1), batch_id="1", worker_id="a"),
            make.batch(make.verdict(1), make.verdict(2), batch_id="2", worker_id="b"),
            make.batch(make.verdict(3), batch_id="3", worker_id="a"),
            make.dead(4),
        )
    )
    status = status_of(store, run)
    assert (status.total, status.rejected, status.repeated) == (10, 2, 3)
    assert (status.done, status.dead, status.duplicates) == (4, 1, 1)
    assert status.workers_seen == 2
    assert not status.complete


@pytest.mark.parametrize(("verdicts", "dead", "complete"), [(3, 1, True), (3, 0, False)])
def test_a_run_is_complete_when_every_claim_has_an_outcome(
    verdicts: int, dead: int, complete: bool, store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=4, rejected=7),
            make.batch(*(make.verdict(n) for n in range(verdicts))),
            *(make.dead(10 + n) for n in range(dead)),
        )
    )
    assert status_of(store, run).complete is complete


def test_duplicates_do_not_make_a_run_complete(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    message = make.batch(make.verdict(0), make.verdict(1))
    store.write(make.incoming(make.announced(claims=3), message, message))
    assert not status_of(store, run).complete


def test_a_run_of_rejected_lines_alone_is_complete(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=0, rejected=3)))
    assert status_of(store, run).complete


def test_the_rate_of_the_first_message_is_its_engines(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    verdicts = [make.verdict(n) for n in range(10)]
    store.write(make.incoming(make.announced(claims=30), make.batch(*verdicts, engine_seconds=4.0)))
    status = status_of(store, run)
    assert status.claims_per_second == 2.5
    assert status.eta_seconds == 8.0


def test_the_rate_is_over_the_time_in_which_claims_came(
    store: Store, make: SimpleNamespace, run: Run, received: Callable[[dict[str, float]], None]
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=100),
            *(
                make.batch(
                    *(make.verdict(10 * b + n) for n in range(10)),
                    batch_id=str(b),
                    engine_seconds=2.0,
                )
                for b in range(4)
            ),
        )
    )
    received({"0": 0, "1": 6, "2": 12, "3": 18})
    status = status_of(store, run)
    assert status.claims_per_second == 40 / (18 + 2)
    assert status.eta_seconds == 60 / 2


def test_the_rate_forgets_what_is_over_a_minute_old(
    store: Store, make: SimpleNamespace, run: Run, received: Callable[[dict[str, float]], None]
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=1_000),
            make.batch(
                *(make.verdict(n) for n in range(500)), batch_id="old", engine_seconds=100.0
            ),
            make.batch(make.verdict(500), batch_id="new", engine_seconds=5.0),
            make.batch(make.verdict(501), batch_id="newest", engine_seconds=5.0),
        )
    )
    received({"old": 0, "new": 3_600, "newest": 3_615})
    assert status_of(store, run).claims_per_second == 2 / (15 + 5)


def test_duplicates_are_no_progress(
    store: Store, make: SimpleNamespace, run: Run, received: Callable[[dict[str, float]], None]
) -> None:
    verdicts = [make.verdict(n) for n in range(10)]
    store.write(
        make.incoming(
            make.announced(claims=20),
            make.batch(*verdicts, batch_id="1", engine_seconds=1.0),
            make.batch(*verdicts, batch_id="2", engine_seconds=50.0),
        )
    )
    received({"1": 0, "2": 9})
    assert status_of(store, run).claims_per_second == 10 / (9 + 1)


def test_a_complete_run_has_nothing_left_to_wait_for(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=1), make.batch(make.verdict(1))))
    assert status_of(store, run).eta_seconds == 0


def test_a_run_without_a_rate_has_no_eta(store: Store, make: SimpleNamespace, run: Run) -> None:
    store.write(make.incoming(make.announced(claims=9), make.dead(1)))
    status = status_of(store, run)
    assert (status.claims_per_second, status.eta_seconds) == (0.0, None)


def test_every_run_is_listed_the_latest_first(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(make.incoming(make.announced()))
    store.write(make.incoming(make.announced(of=other_run)))
    assert [s.run_id for s in run_statuses(store)] == [other_run.run_id, run.run_id]


# What a loss cost, and what nobody wants any more.


def test_claims_that_workers_gave_back_are_counted_and_are_no_progress(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=9), make.announced(of=other_run)))
    store.write(make.incoming(make.returned(1, 2), make.returned(3)))
    store.write(make.incoming(make.returned(1, 2)))
    status = status_of(store, run)
    assert (status.returned, status.done, status.duplicates, status.lost_work) == (5, 0, 0, 0)
    assert status_of(store, other_run).returned == 0


def test_lost_work_are_the_verdicts_of_later_attempts(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=9),
            make.batch(make.verdict(0), make.verdict(1), batch_id="1", attempt=1),
            make.batch(make.verdict(1), make.verdict(2), batch_id="1", attempt=2),
            make.batch(make.verdict(3), batch_id="2", attempt=3),
        )
    )
    assert status_of(store, run).lost_work == 3


def test_a_dead_claim_that_got_a_verdict_counts_as_done_and_not_as_dead(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=2), make.dead(0), make.dead(1)))
    assert status_of(store, run).complete
    store.write(make.incoming(make.batch(make.verdict(0))))
    status = status_of(store, run)
    assert (status.done, status.dead, status.complete) == (1, 1, True)


def test_a_run_is_cancelled_while_every_sending_of_it_is(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(submission_id="sub-1")))
    assert not status_of(store, run).cancelled
    store.cancel(find_run(store, run.run_id).run_key)
    assert status_of(store, run).cancelled
    store.write(make.incoming(make.announced(submission_id="sub-2")))
    assert not status_of(store, run).cancelled


# Finding a run by what a person types.


@pytest.fixture
def two_alike(store: Store, make: SimpleNamespace, context: ContextSpec) -> list[Run]:
    """Two runs whose ids begin with the same digit."""
    by_digit: dict[str, Run] = {}
    for number in range(100):
        made = Run(source="f", source_digest=f"d{number}", context=context, prompt=PromptSpec())
        digit = made.run_id[4]
        if digit in by_digit:
            pair = [by_digit[digit], made]
            store.write(make.incoming(*(make.announced(of=each) for each in pair)))
            return pair
        by_digit[digit] = made
    raise AssertionError


def test_a_run_is_found_by_its_id_or_the_beginning_of_it(
    store: Store, two_alike: list[Run]
) -> None:
    one = two_alike[0]
    for wanted in (one.run_id, one.run_id[:-3], one.run_id.removeprefix("run-"), one.run_id[4:-3]):
        found = find_run(store, wanted)
        assert (found.run_id, found.run) == (one.run_id, one)


@pytest.mark.parametrize("length", [0, 4, 5])
def test_an_ambiguous_prefix_is_reported_with_the_matching_ids(
    length: int, store: Store, two_alike: list[Run]
) -> None:
    with pytest.raises(StoreError, match="several runs start with") as refused:
        find_run(store, two_alike[0].run_id[:length])
    assert all(run.run_id in str(refused.value) for run in two_alike)


@pytest.mark.parametrize("wanted", ["run-none", "%", "_", "zzz"])
def test_an_unknown_run_is_reported_with_the_known_ones(
    wanted: str, store: Store, two_alike: list[Run]
) -> None:
    with pytest.raises(StoreError, match="no run starts with") as refused:
        find_run(store, wanted)
    assert all(run.run_id in str(refused.value) for run in two_alike)


def test_in_an_empty_store_there_is_no_run_at_all(store: Store) -> None:
    with pytest.raises(StoreError, match="no run starts with 'run-1'; the store has no runs"):
        find_run(store, "run-1")


def test_a_run_that_was_not_announced_is_found_by_its_id(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1))))
    assert find_run(store, run.run_id).run is None
