"""Dead claims as a person handles them: seen, tried again, let go."""

from types import SimpleNamespace

from services.contracts import DeadReason, Run
from services.store import DeadRow, Store, dead_claims, drop_dead, find_run, reopen_dead, run_status


def ids(rows: list[DeadRow]) -> list[str]:
    return [row.claim.claim_id for row in rows]


def counted(store: Store, run: Run) -> tuple[int, int, bool]:
    """Verdicts, dead claims, and whether the run is complete."""
    status = run_status(store, run.run_id)
    assert status is not None
    return status.done, status.dead, status.complete


def test_a_dead_claim_is_seen_with_all_that_is_needed_to_try_it_again(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    dead = make.dead(7, reason=DeadReason.ENGINE_FAILED, detail="why", failures=3)
    store.write(make.incoming(dead))
    (row,) = dead_claims(store)
    assert row.claim == dead.claim
    assert row.run_id == run.run_id
    assert (row.reason, row.detail, row.failures) == (DeadReason.ENGINE_FAILED, "why", 3)


def test_dead_claims_are_listed_in_input_order_and_verdicts_are_not(
    store: Store, make: SimpleNamespace
) -> None:
    store.write(make.incoming(make.dead(9), make.batch(make.verdict(5)), make.dead(2)))
    assert ids(dead_claims(store)) == ["c2", "c9"]


def test_dead_claims_of_one_run_or_with_some_ids_can_be_picked(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(make.incoming(make.dead(1), make.dead(2), make.dead(1, of=other_run)))
    known = find_run(store, run.run_id)
    assert ids(dead_claims(store, known)) == ["c1", "c2"]
    assert ids(dead_claims(store, known, ["c2", "c9"])) == ["c2"]
    assert ids(dead_claims(store, None, ["c1"])) == ["c1", "c1"]


def test_dropped_claims_are_not_listed_and_stay_dead_in_the_results(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=2), make.dead(1), make.dead(2)))
    drop_dead(store, dead_claims(store, None, ["c1"]))
    assert ids(dead_claims(store)) == ["c2"]
    assert counted(store, run) == (0, 2, True)
    assert store.finished(run.run_id, ["c1", "c2"]) == {"c1", "c2"}


def test_a_run_waits_again_for_the_claims_that_are_tried_again(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=2), make.dead(1), make.dead(2)))
    reopen_dead(store, dead_claims(store, None, ["c1"]))
    assert counted(store, run) == (0, 1, False)
    assert store.finished(run.run_id, ["c1", "c2"]) == {"c2"}
    store.write(make.incoming(make.batch(make.verdict(1))))
    assert counted(store, run) == (1, 1, True)


def test_a_verdict_that_came_before_the_death_was_taken_back_stays(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=1), make.dead(1)))
    seen = dead_claims(store)
    store.write(make.incoming(make.batch(make.verdict(1))))
    reopen_dead(store, seen)
    drop_dead(store, seen)
    assert counted(store, run) == (1, 0, True)


def test_a_later_death_is_neither_reopened_nor_dropped_with_an_earlier_one(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=1), make.dead(1)))
    seen = dead_claims(store)
    store.write(make.incoming(make.dead(1)))
    reopen_dead(store, seen)
    drop_dead(store, seen)
    assert counted(store, run) == (0, 1, True)
    assert ids(dead_claims(store)) == ["c1"]


def test_the_same_claim_of_another_run_is_left_alone(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(make.incoming(make.dead(1), make.dead(1, of=other_run)))
    reopen_dead(store, dead_claims(store, find_run(store, run.run_id)))
    assert [row.run_id for row in dead_claims(store)] == [other_run.run_id]


def test_where_nothing_is_dead_nothing_is_listed_and_nothing_happens(store: Store) -> None:
    assert dead_claims(store) == []
    drop_dead(store, [])
    reopen_dead(store, [])
