"""A run is complete when it has the outcomes of its claims, not when it has as many."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Run, RunAnnouncement, Totals, load_settings
from services.contracts.proofs import ClaimsDigest
from services.store import Incoming, RunStatus, Store, dead_claims, find_run, reopen_dead
from services.store import run_status as status_of_run
from services.store.schema import outcomes
from tests.older_stores import downgrade

Opener = Callable[..., Store]


def announced(run: Run, numbers: Iterable[int]) -> RunAnnouncement:
    claims = [(f"c{number}", number) for number in numbers]
    return RunAnnouncement(
        run=run,
        submission_id="sub-1",
        totals=Totals(lines=len(claims), claims=len(claims), repeated=0, rejected=0),
        digest=str(ClaimsDigest.of(claims)),
    )


def status(store: Store, run: Run) -> RunStatus:
    found = status_of_run(store, run.run_id)
    assert found is not None
    return found


def state(store: Store, run: Run) -> tuple[bool, bool | None]:
    now = status(store, run)
    return now.complete, now.proven


def test_a_run_with_the_outcomes_of_all_its_claims_is_proven(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(announced(run, range(4)), make.batch(make.verdict(0))))
    assert state(store, run) == (False, None)
    store.write(make.incoming(make.dead(3), make.batch(make.verdict(1), make.verdict(2))))
    assert state(store, run) == (True, True)


def test_as_many_outcomes_of_other_claims_do_not_make_it_complete(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(announced(run, range(3)), make.batch(*map(make.verdict, (0, 1, 7)))))
    assert state(store, run) == (False, False)


def test_a_verdict_at_another_position_does_not_make_it_complete(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            announced(run, range(2)), make.batch(make.verdict(0), make.verdict(1, position=5))
        )
    )
    assert state(store, run) == (False, False)


def test_a_run_whose_producer_announced_no_digest_is_complete_and_unproven(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=1), make.batch(make.verdict(0))))
    assert state(store, run) == (True, None)


def test_a_dead_claim_that_is_answered_after_all_is_counted_once(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(announced(run, range(2)), make.dead(0), make.batch(make.verdict(1))))
    assert state(store, run) == (True, True)
    reopen_dead(store, dead_claims(store, find_run(store, run.run_id)))
    assert state(store, run) == (False, None)
    store.write(make.incoming(make.dead(0)))
    store.write(make.incoming(make.batch(make.verdict(0))))
    assert state(store, run) == (True, True)


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("completeness")


@given(
    batches=st.lists(
        st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True), min_size=1, max_size=8
    ),
    dead=st.lists(st.integers(0, 7), max_size=3),
)
def test_however_verdicts_come_it_is_complete_when_each_claim_has_an_outcome(
    batches: list[list[int]], dead: list[int], make: SimpleNamespace, run: Run, prefilled: Path
) -> None:
    file = prefilled / "s.sqlite"
    file.unlink(missing_ok=True)
    with Store.open(load_settings(store_url=str(file))) as store:
        store.write(make.incoming(announced(run, range(8))))
        for number in dead:
            store.write(make.incoming(make.dead(number)))
        for numbers in batches:
            store.write(make.incoming(make.batch(*map(make.verdict, numbers))))
        have = {n for numbers in batches for n in numbers} | set(dead)
        assert status(store, run).complete == (have == set(range(8)))
        rest = [make.verdict(n) for n in range(8) if n not in have]
        if rest:
            store.write(make.incoming(make.batch(*rest)))
        assert state(store, run) == (True, True)
    for left in prefilled.iterdir():
        left.unlink()


def test_outcomes_of_claims_that_the_file_does_not_have_are_removed_and_the_rest_counts(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            announced(run, range(4)),
            make.batch(make.verdict(0), make.verdict(9, gold="A"), make.verdict(1, position=6)),
            make.dead(8),
        )
    )
    assert state(store, run) == (False, False)
    removed = store.remove_foreign(run.run_id, map(make.claim, range(4)))
    assert sorted(removed) == ["c1", "c8", "c9"]
    now = status(store, run)
    assert (now.done, now.dead, now.judged, now.proven) == (1, 0, 0, None)
    assert sum(now.verdicts.values()) == 1
    assert store.finished(run.run_id, [f"c{n}" for n in range(10)]) == {"c0"}
    store.write(make.incoming(make.batch(*map(make.verdict, (1, 2, 3)))))
    assert state(store, run) == (True, True)
    assert store.remove_foreign(run.run_id, map(make.claim, range(4))) == []


@pytest.mark.parametrize("foreign", [False, True])
def test_a_run_in_a_store_of_version_5_goes_on_and_is_proven_once_it_is_sent_again(
    foreign: bool, open_store: Opener, make: SimpleNamespace, run: Run
) -> None:
    before = open_store()
    before.write(
        make.incoming(make.announced(claims=3), make.batch(make.verdict(0), make.verdict(1)))
    )
    with before.transaction() as connection:
        downgrade(connection, 5)
    before.close()
    store = open_store()
    assert state(store, run) == (False, None)
    store.write(make.incoming(make.batch(make.verdict(9 if foreign else 2))))
    assert state(store, run) == (True, None)
    store.write(make.incoming(announced(run, range(3))))
    assert state(store, run) == (not foreign, not foreign)


def test_the_digest_is_kept_in_the_transaction_that_writes_the_outcomes(
    store: Store, make: SimpleNamespace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(make.incoming(announced(run, range(2)), make.batch(make.verdict(0))))
    incoming: Incoming = make.incoming(make.batch(make.verdict(1)))
    monkeypatch.setattr(
        "services.store.store.insert", lambda _: (_ for _ in ()).throw(RuntimeError("killed"))
    )
    with pytest.raises(RuntimeError, match="killed"):
        store.write(incoming)
    monkeypatch.undo()
    with store.transaction() as connection:
        assert len(connection.execute(outcomes.select()).all()) == 1
    store.write(incoming)
    assert state(store, run) == (True, True)
