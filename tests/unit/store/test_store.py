import contextlib
import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url, select
from sqlalchemy.dialects import sqlite

from services.contracts import DeadReason, Run, StartupPhases, Verdict, VerdictBatch, load_settings
from services.contracts.control import MAX_CANCELLED
from services.contracts.errors import StoreError, StoreRefused, UsageError
from services.contracts.proofs import verdict_proof
from services.store import Incoming, Store, build_report, find_run, run_status
from services.store.database import checked_url, failure
from services.store.schema import SCHEMA_VERSION, is_dead, metadata, outcomes, runs
from services.store.schema import startups as startups_table
from tests.older_stores import downgrade

Opener = Callable[..., Store]


def outcome(store: Store, claim_id: str) -> tuple[str | None, str | None]:
    """The label and the reason of a claim."""
    with store.transaction() as connection:
        query = select(outcomes.c.label, outcomes.c.reason).where(outcomes.c.claim_id == claim_id)
        label, reason = connection.execute(query).one()
        return label, reason


def counted(store: Store, run: Run) -> tuple[int, int, int]:
    """Verdicts, dead claims and duplicates."""
    status = run_status(store, run.run_id)
    assert status is not None
    return status.done, status.dead, status.duplicates


# Writing.


def test_a_verdict_is_stored_with_all_its_fields(store: Store, make: SimpleNamespace) -> None:
    store.write(make.incoming(make.batch(make.verdict(3, "B B", gold="A"))))
    with store.transaction() as connection:
        row = connection.execute(select(outcomes)).mappings().one()
    assert row["claim_id"] == "c3"
    assert row["position"] == 3
    assert row["claim"] == "Claim 3, Łódź."
    assert (row["gold"], row["label"]) == ("A", "B B")
    assert (row["mass"], row["raw_text"], row["prompt_tokens"]) == (0.75, " one", 10)
    assert row["reason"] is None


def test_verdicts_on_the_same_evidence_have_the_same_number(
    store: Store, make: SimpleNamespace
) -> None:
    evidence = ["One.", "Two.", "One.", None]
    proofs = tuple(verdict_proof("0" * 24, text) for text in evidence)
    verdicts = [make.verdict(number) for number in range(4)]
    store.write(make.incoming(make.batch(*verdicts, proofs=proofs), make.batch(make.verdict(4))))
    query = select(outcomes.c.evidence_number).order_by(outcomes.c.position)
    with store.transaction() as connection:
        one, two, again, none, without_proof = connection.execute(query).scalars()
    assert one == again != two
    assert none is without_proof is None


def test_a_dead_claim_is_stored_with_its_reason_and_its_evidence(
    store: Store, make: SimpleNamespace
) -> None:
    store.write(make.incoming(make.dead(3, failures=2)))
    with store.transaction() as connection:
        row = connection.execute(select(outcomes)).mappings().one()
    assert (row["reason"], row["detail"]) == ("too-long", "it has 9,999 tokens")
    assert (row["failures"], row["dropped"]) == (2, False)
    assert (row["claim"], row["evidence"], row["gold"]) == ("Claim 3, Łódź.", "Long.", "B B")
    assert row["label"] is None


def test_a_message_that_comes_twice_counts_once(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    message = make.batch(*(make.verdict(n) for n in range(5)))
    store.write(make.incoming(message))
    assert counted(store, run) == (5, 0, 0)
    store.write(make.incoming(message))
    assert counted(store, run) == (5, 0, 5)


def test_a_message_that_comes_twice_in_one_transaction_counts_once(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    message = make.batch(make.verdict(1), make.verdict(2))
    store.write(make.incoming(message, message))
    assert counted(store, run) == (2, 0, 2)


def test_of_two_batches_that_overlap_only_the_new_claims_count(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1), make.verdict(2))))
    store.write(make.incoming(make.batch(make.verdict(2), make.verdict(3), batch_id="b2")))
    assert counted(store, run) == (3, 0, 1)


def test_a_claim_keeps_its_first_verdict(store: Store, make: SimpleNamespace) -> None:
    store.write(make.incoming(make.batch(make.verdict(1, "A"))))
    store.write(make.incoming(make.batch(make.verdict(1, "C"))))
    assert outcome(store, "c1") == ("A", None)


def test_a_dead_claim_gives_way_to_a_verdict_that_comes_later(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.dead(1), make.dead(3)))
    store.write(make.incoming(make.batch(make.verdict(1, "C"), make.verdict(2))))
    assert outcome(store, "c1") == ("C", None)
    assert counted(store, run) == (2, 1, 0)
    with store.transaction() as connection:
        row = connection.execute(select(outcomes).where(outcomes.c.claim_id == "c1")).one()
    assert (row.detail, row.evidence, row.failures, row.dropped) == (None, None, None, False)


def test_a_verdict_that_came_in_place_of_a_death_stays(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.dead(1)))
    store.write(make.incoming(make.batch(make.verdict(1, "C"))))
    store.write(make.incoming(make.batch(make.verdict(1, "A")), make.dead(1)))
    assert outcome(store, "c1") == ("C", None)
    assert counted(store, run) == (1, 0, 1)


def test_a_verdict_stays_when_the_claim_is_called_dead_later(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1, "C"))))
    store.write(make.incoming(make.dead(1)))
    assert outcome(store, "c1") == ("C", None)
    assert counted(store, run) == (1, 0, 0)


def test_a_claim_that_dies_again_is_one_dead_claim_with_its_latest_reason(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.dead(1), make.dead(1)))
    store.write(make.incoming(make.dead(1, reason=DeadReason.ENGINE_REFUSED)))
    assert outcome(store, "c1") == (None, "engine-refused")
    assert counted(store, run) == (0, 1, 0)


def test_two_runs_do_not_share_their_claims(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(
        make.incoming(
            make.batch(make.verdict(1), make.verdict(2)),
            make.batch(make.verdict(1), of=other_run),
            make.dead(2, of=other_run),
        )
    )
    assert counted(store, run) == (2, 0, 0)
    assert counted(store, other_run) == (1, 1, 0)


def test_an_announcement_without_totals_does_not_undo_one_with_totals(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=5, rejected=1)))
    store.write(make.incoming(make.announced()))
    status = run_status(store, run.run_id)
    assert status is not None
    assert (status.total, status.rejected) == (5, 1)


def test_a_run_may_be_announced_after_its_verdicts(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1))))
    store.write(make.incoming(make.announced(claims=1)))
    with store.transaction() as connection:
        (row,) = connection.execute(select(runs)).all()
    assert Run.model_validate_json(row.run) == run
    assert (row.lines, row.claims) == (1, 1)


def test_nothing_to_write_is_written(store: Store) -> None:
    store.write(Incoming())
    assert len(Incoming()) == 0


def test_incoming_counts_claims_and_not_messages(make: SimpleNamespace) -> None:
    gathered = make.incoming(
        make.announced(), make.batch(make.verdict(1), make.verdict(2)), make.dead(3)
    )
    assert len(gathered) == 3


def test_a_large_transaction_is_counted_right(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    batches = [
        make.batch(*(make.verdict(n) for n in range(s, s + 1_000)), batch_id=f"b{s}")
        for s in range(0, 3_000, 1_000)
    ]
    store.write(make.incoming(*batches, batches[0]))
    assert counted(store, run) == (3_000, 0, 1_000)


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store.open(load_settings(store_url=str(tmp_path_factory.mktemp("s") / "s.sqlite")))
    yield store
    store.close()


@settings(max_examples=20)  # each commit waits for the disk
@given(arrivals=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=8))
def test_whatever_comes_in_whatever_order_each_claim_has_its_first_verdict_or_is_dead(
    arrivals: list[tuple[bool, int]], long_lived: Store, run: Run, make: SimpleNamespace
) -> None:
    of = run.model_copy(update={"source_digest": secrets.token_hex(8)})
    answered: set[int] = set()
    duplicates = 0
    for dies, number in arrivals:
        if not dies:
            duplicates += number in answered
            answered.add(number)
        message = make.dead(number, of=of) if dies else make.batch(make.verdict(number), of=of)
        long_lived.write(make.incoming(message))
    dead = {number for _, number in arrivals} - answered
    assert counted(long_lived, of) == (len(answered), len(dead), duplicates)


# Submissions: what is cancelled are the sendings that there were.


def key(store: Store, run: Run) -> int:
    return find_run(store, run.run_id).run_key


def test_a_submission_that_was_announced_is_wanted_and_another_is_not_known(
    store: Store, make: SimpleNamespace
) -> None:
    store.write(make.incoming(make.announced(submission_id="sub-1")))
    store.write(make.incoming(make.announced(claims=3, submission_id="sub-1")))
    assert store.is_active("sub-1") is True
    assert store.is_active("sub-2") is None


def test_verdicts_alone_announce_no_submission(store: Store, make: SimpleNamespace) -> None:
    store.write(make.incoming(make.batch(make.verdict(1)), make.returned(2, submission_id="sub-1")))
    assert store.is_active("sub-1") is None


def test_a_cancelled_run_can_be_sent_again_and_what_was_sent_before_stays_cancelled(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(submission_id="sub-1")))
    store.cancel(key(store, run))
    assert store.is_active("sub-1") is False
    store.write(make.incoming(make.announced(submission_id="sub-2")))
    assert (store.is_active("sub-1"), store.is_active("sub-2")) == (False, True)
    # What is delivered again does not undo it.
    store.write(make.incoming(make.announced(submission_id="sub-1")))
    assert store.is_active("sub-1") is False


def test_cancelling_a_run_leaves_the_others(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.announced(of=other_run)))
    store.cancel(key(store, run))
    assert store.is_active(f"sub-{run.run_id}") is False
    assert store.is_active(f"sub-{other_run.run_id}") is True


def test_claims_that_are_sent_by_hand_are_a_submission(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced()))
    for _ in range(2):
        store.add_submission(key(store, run), "retry-1", "0" * 32)
    assert store.is_active("retry-1") is True
    store.cancel(key(store, run))
    assert store.is_active("retry-1") is False


def test_the_latest_cancellations_come_first_and_no_more_than_a_notice_holds(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    assert store.cancelled_submissions() == ()
    store.write(make.incoming(make.announced(), make.announced(of=other_run)))
    for number in range(MAX_CANCELLED):
        store.add_submission(key(store, run), f"many-{number}", "0" * 32)
    store.cancel(key(store, run))
    store.cancel(key(store, other_run))
    cancelled = store.cancelled_submissions()
    assert len(cancelled) == MAX_CANCELLED
    assert cancelled[0] == f"sub-{other_run.run_id}"


def test_a_cancellation_is_listed_for_a_while_and_then_until_its_run_is_settled(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    other_run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.write(make.incoming(make.announced(), make.announced(of=other_run)))
    for cancelled in (run, other_run):
        store.cancel(key(store, cancelled))
    assert len(store.cancelled_submissions({run.run_id, other_run.run_id})) == 2
    monkeypatch.setattr("services.store.store._CANCELLED_SECONDS", -1.0)  # and that was long ago
    assert store.cancelled_submissions({run.run_id}) == (f"sub-{other_run.run_id}",)


def test_cancelling_again_does_not_make_an_old_cancellation_new(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.announced(of=other_run)))
    for cancelled in (run, other_run, run):
        store.cancel(key(store, cancelled))
    assert store.cancelled_submissions() == (f"sub-{other_run.run_id}", f"sub-{run.run_id}")


# All or nothing.


def test_a_transaction_that_fails_half_way_leaves_nothing(
    store: Store, make: SimpleNamespace, tmp_path: Path, run: Run
) -> None:
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.execute(
            "CREATE TRIGGER no_dead BEFORE INSERT ON outcomes WHEN NEW.reason IS NOT NULL "
            "BEGIN SELECT RAISE(ABORT, 'no dead claims today'); END"
        )
    with pytest.raises(StoreError, match="no dead claims today"):
        store.write(make.incoming(make.announced(), make.batch(make.verdict(1)), make.dead(2)))
    assert run_status(store, run.run_id) is None
    assert store.finished(run.run_id, ["c1", "c2"]) == set()
    store.write(make.incoming(make.batch(make.verdict(1))))
    assert counted(store, run) == (1, 0, 0)


def test_an_error_inside_a_transaction_undoes_it(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(1))))
    with pytest.raises(RuntimeError), store.transaction() as connection:
        connection.execute(outcomes.delete())
        raise RuntimeError("power cut")
    assert store.finished(run.run_id, ["c1"]) == {"c1"}


# Which claims are finished.


def test_finished_are_the_claims_with_any_outcome_in_that_run(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    store.write(
        make.incoming(
            make.batch(make.verdict(1)), make.dead(2), make.batch(make.verdict(3), of=other_run)
        )
    )
    assert store.finished(run.run_id, ["c1", "c2", "c3", "c4"]) == {"c1", "c2"}
    assert store.finished(other_run.run_id, ["c1", "c3"]) == {"c3"}


def test_of_an_unknown_run_nothing_is_finished(store: Store) -> None:
    assert store.finished("run-none", ["c1"]) == set()


def test_more_claims_may_be_asked_about_than_a_statement_has_parameters(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(*(make.verdict(n) for n in range(0, 1_000, 2)))))
    asked = [f"c{n}" for n in range(40_000)]
    assert store.finished(run.run_id, asked) == {f"c{n}" for n in range(0, 1_000, 2)}
    assert store.finished(run.run_id, []) == set()


# Opening.


def test_a_store_is_a_file_for_its_owner_alone(tmp_path: Path, open_store: Opener) -> None:
    open_store(tmp_path / "deep" / "er" / "s.sqlite")
    mode = (tmp_path / "deep" / "er" / "s.sqlite").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_a_store_may_be_named_by_its_file_or_by_a_url(
    form: str, tmp_path: Path, open_store: Opener
) -> None:
    open_store(form.format(tmp_path / "s.sqlite"))
    assert (tmp_path / "s.sqlite").is_file()


@pytest.mark.parametrize(
    "name", ["a b.sqlite", "é.sqlite", "a#b.sqlite", "a%20b.sqlite", "a?b.sqlite", "a@b:c.sqlite"]
)
def test_a_stores_file_may_have_any_name(name: str, tmp_path: Path, open_store: Opener) -> None:
    open_store(tmp_path / name)
    assert (tmp_path / name).is_file()


def test_what_is_stored_outlives_the_process(
    open_store: Opener, make: SimpleNamespace, run: Run
) -> None:
    first = open_store()
    first.write(make.incoming(make.batch(make.verdict(1))))
    first.close()
    assert counted(open_store(create=False), run) == (1, 0, 0)


def test_a_commit_survives_a_power_cut_and_readers_do_not_wait(store: Store) -> None:
    with store.transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_two_may_write_to_one_store(open_store: Opener, make: SimpleNamespace, run: Run) -> None:
    one, other = open_store(), open_store()
    one.write(make.incoming(make.batch(make.verdict(1))))
    other.write(make.incoming(make.batch(make.verdict(1), make.verdict(2))))
    assert counted(one, run) == counted(other, run) == (2, 0, 1)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "the store must be a file"),
        ("sqlite:///:memory:", "the store must be a file"),
        ("mysql://u@h/d", "must be SQLite or PostgreSQL, not mysql"),
        ("://x", "the store's URL is not valid"),
        ("postgresql://h:port/d", "the store's URL is not valid"),
    ],
)
def test_an_invalid_store_url_is_reported(url: str, says: str, open_store: Opener) -> None:
    with pytest.raises(UsageError, match=says):
        open_store(url)


def test_a_postgresql_url_may_begin_as_libpq_takes_it_too() -> None:
    ours, theirs = (
        checked_url(load_settings(store_url=f"{scheme}://u@localhost/d"))
        for scheme in ("postgresql", "postgres")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("url", "environment", "allowed"),
    [
        ("postgresql://u@db.example.org/d", {}, False),
        ("postgresql://u@db.example.org/d?sslmode=require", {}, False),
        ("postgresql://u@/d?host=db.example.org", {}, False),
        ("postgresql://u@/d?host=localhost,db.example.org", {}, False),
        ("postgresql://u@/d?host=localhost&host=db.example.org", {}, False),
        ("postgresql://u@/d", {"PGHOST": "db.example.org"}, False),
        ("postgresql://u@localhost/d?hostaddr=10.0.0.7", {}, False),
        ("postgresql://u@/d", {"PGHOSTADDR": "10.0.0.7"}, False),
        ("postgresql://u@db.example.org/d?sslmode=prefer", {"PGSSLMODE": "verify-full"}, False),
        ("postgresql://u@localhost/d?service=remote", {}, False),
        ("postgresql://u@/d", {"PGSERVICE": "remote", "PGSSLMODE": "verify-full"}, False),
        ("postgresql://u@/d?service=remote&sslmode=verify-full", {}, True),
        ("postgresql://u@/d?service=remote", {"KEEPWARM_PLAINTEXT_HOSTS": "remote"}, True),
        ("postgresql://u@db.example.org/d?sslmode=verify-full", {}, True),
        ("postgresql://u@db.example.org/d?sslmode=verify-ca", {}, True),
        ("postgresql://u@db.example.org/d", {"PGSSLMODE": "verify-full"}, True),
        (
            "postgresql://u@db.example.org/d",
            {"KEEPWARM_PLAINTEXT_HOSTS": "rabbitmq *.example.org"},
            True,
        ),
        ("postgresql://u@127.0.0.1/d", {}, True),
        ("postgresql://u@/d", {}, True),
        ("postgresql://u@/d?host=/run/postgresql", {}, True),
    ],
)
def test_claims_go_to_another_machines_postgresql_by_verified_tls_alone(
    url: str, environment: dict[str, str], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(store_url=url)
    if allowed:
        checked_url(settings)
        return
    with pytest.raises(UsageError, match=r"add \?sslmode=verify-full.* KEEPWARM_PLAINTEXT_HOSTS="):
        checked_url(settings)


@pytest.mark.parametrize("closed", ["file", "directory"])
@pytest.mark.parametrize("written_to", [False, True])
def test_a_store_of_somebody_elses_can_be_read(
    closed: str,
    written_to: bool,
    open_dir: Path,
    make: SimpleNamespace,
    run: Run,
    unprivileged: Callable[[], AbstractContextManager[None]],
) -> None:
    settings = load_settings(store_url=str(open_dir / "s.sqlite"))
    Store.open(settings).close()
    (open_dir / "s.sqlite").chmod(0o644)
    with contextlib.ExitStack() as writing:
        writer = writing.enter_context(Store.open(settings))
        writer.write(make.incoming(make.batch(make.verdict(1))))
        if not written_to:
            writing.close()
        (open_dir / "s.sqlite").chmod(0o444 if closed == "file" else 0o644)
        open_dir.chmod(0o555 if closed == "directory" else 0o777)
        there = sorted(open_dir.iterdir())
        with unprivileged(), Store.open(settings, create=False) as store:
            assert counted(store, run) == (1, 0, 0)
            assert build_report(store, find_run(store, run.run_id)).verdicts
            with pytest.raises(StoreError, match="readonly database.* this user may write to it"):
                store.write(make.incoming(make.batch(make.verdict(2))))
        assert sorted(open_dir.iterdir()) == there
        if written_to:
            writer.write(make.incoming(make.batch(make.verdict(3))))


def test_a_store_of_an_older_version_that_we_may_not_write_is_refused_with_the_way_out(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    settings = load_settings(store_url=str(open_dir / "s.sqlite"))
    Store.open(settings).close()
    with closing(sqlite3.connect(open_dir / "s.sqlite")) as database, database:
        database.execute("UPDATE keepwarm_schema SET version = 4")
    (open_dir / "s.sqlite").chmod(0o444)
    open_dir.chmod(0o555)
    with unprivileged(), pytest.raises(StoreError, match="has schema version 4 .* ask its owner"):
        Store.open(settings, create=False)


def test_a_store_that_is_not_there_is_not_made_to_be_read(
    tmp_path: Path, open_store: Opener
) -> None:
    with pytest.raises(StoreError, match="there is no store at .*none.* --store"):
        open_store(tmp_path / "none.sqlite", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_store(tmp_path: Path, open_store: Opener) -> None:
    with pytest.raises(StoreError, match="cannot be written by .*: Is a directory"):
        open_store(tmp_path)


def test_a_path_through_a_file_is_no_store(tmp_path: Path, open_store: Opener) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written by"):
        open_store(tmp_path / "file" / "s.sqlite")


def test_a_file_of_another_kind_is_no_store(tmp_path: Path, open_store: Opener) -> None:
    (tmp_path / "claims.jsonl").write_text('{"claim": "C."}\n' * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        open_store(tmp_path / "claims.jsonl")


def test_a_read_only_file_is_reported(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    settings = load_settings(store_url=str(open_dir / "s.sqlite"))
    Store.open(settings).close()
    (open_dir / "s.sqlite").chmod(0o444)
    with (
        unprivileged(),
        pytest.raises(StoreError, match="cannot be written by .*: Permission denied; fix"),
    ):
        Store.open(settings)


def test_a_store_that_fails_is_reported_with_the_next_step(
    store: Store, make: SimpleNamespace, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.execute("DROP TABLE outcomes")
    with pytest.raises(StoreError, match="no such table: outcomes. Check that it exists"):
        store.write(make.incoming(make.batch(make.verdict(1))))


def test_the_database_knows_the_columns_that_this_schema_version_promises(
    store: Store, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        for table in metadata.tables.values():
            found = {row[1] for row in database.execute(f"PRAGMA table_info({table.name})")}
            assert found == set(table.columns.keys())
        assert database.execute("SELECT version FROM keepwarm_schema").fetchall() == [
            (SCHEMA_VERSION,)
        ]


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 1, 0])
def test_a_store_of_another_schema_version_is_refused(
    version: int, open_store: Opener, tmp_path: Path
) -> None:
    open_store().close()
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("UPDATE keepwarm_schema SET version = ?", (version,))
    with pytest.raises(StoreError, match=f"has schema version {version}; this Keepwarm supports"):
        open_store()


def test_a_store_of_version_2_is_brought_up_to_date_and_keeps_what_it_has(
    open_store: Opener, make: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    before = open_store()
    before.write(make.incoming(make.batch(make.verdict(0)), make.dead(1)))
    with before.transaction() as connection:
        downgrade(connection, 2)
    before.close()
    file = tmp_path / "store.sqlite"
    with ThreadPoolExecutor(4) as pool:
        store, *_ = pool.map(lambda _: open_store(), range(4))
    store.write(make.incoming(make.batch(make.verdict(2)), make.ready("start-1")))
    assert counted(store, run) == (2, 1, 0)
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT version FROM keepwarm_schema").fetchall() == [
            (SCHEMA_VERSION,)
        ]
        assert database.execute("SELECT startup_id FROM startups").fetchall() == [("start-1",)]


def test_dead_claims_are_found_without_reading_the_verdicts(store: Store) -> None:
    query = select(outcomes).where(outcomes.c.run_key == 1, is_dead)
    sql = query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    with store.transaction() as connection:
        (step,) = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}").all()
    assert "INDEX outcomes_dead" in step[3]


def test_a_startup_that_is_reported_twice_is_stored_once(
    store: Store, make: SimpleNamespace
) -> None:
    told = make.ready("start-1", phases=StartupPhases(load=9.5))
    for startups in ((told, make.ready("start-2", warm=True)), (told,)):
        store.write(make.incoming(*startups))
    with store.transaction() as connection:
        rows = connection.execute(select(startups_table)).mappings().all()
    assert [(row["startup_id"], row["warm"]) for row in rows] == [
        ("start-1", False),
        ("start-2", True),
    ]
    assert (rows[0]["seconds"], rows[0]["load"], rows[0]["compile"]) == (60.0, 9.5, None)


def test_a_write_returns_how_many_verdicts_were_the_first_of_their_claims(
    store: Store, make: SimpleNamespace, other_run: Run
) -> None:
    first = make.incoming(make.batch(make.verdict(0), make.verdict(1)), make.dead(2))
    assert store.write(first) == 2
    again = make.incoming(
        make.batch(*map(make.verdict, (1, 2, 3))), make.batch(make.verdict(0), of=other_run)
    )
    assert store.write(again) == 3


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@127.0.0.1:1/d",
        "postgresql://u@127.0.0.1:1/d?password=hunter2",
    ],
)
def test_a_stores_password_is_in_no_error(url: str, open_store: Opener) -> None:
    with pytest.raises(StoreError) as failed:
        open_store(url)
    assert "hunter2" not in str(failed.value)


def test_services_that_open_a_new_store_at_the_same_moment_make_it_once(tmp_path: Path) -> None:
    settings = load_settings(store_url=str(tmp_path / "store.sqlite"))
    with ThreadPoolExecutor(8) as pool:
        for store in pool.map(lambda _: Store.open(settings), range(8)):
            store.close()


@pytest.mark.parametrize(
    ("why", "says"),
    [
        ("server does not support SSL, but SSL was required", "Turn TLS on in the server"),
        ("FATAL:  connection requires a valid client certificate", "sslcert"),
        ('root certificate file "/root/.postgresql/root.crt" does not exist', "sslrootcert"),
        ('role "u" is not permitted to log in', "the right to log in"),
        ('database "d" does not exist', "createdb"),
        ('permission denied for database "d"', "Grant this user CONNECT"),
        ("received invalid response to SSL negotiation: H", "this is not PostgreSQL"),
        ("something else", "that the server is running"),
    ],
)
def test_an_error_of_postgresql_names_the_next_step(why: str, says: str) -> None:
    assert says in failure(make_url("postgresql://u@h/d"), psycopg.OperationalError(why))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("127.0.0.1:1/d", "Connection refused. Check the host and port"),
        ("localhost/d?host=/no/such/directory", "No such file or directory. Check the host"),
        ("127.0.0.1/d?sslmode=bad", 'invalid sslmode value: "bad". Correct the options in'),
        ("no-such-host.localhost.invalid/d?sslmode=verify-full", "Correct the host in the store's"),
        ("127.0.0.1/d?no_such_option=1", "Correct the options in the store's URL"),
    ],
)
def test_a_connection_to_postgresql_that_fails_names_the_url_as_written_and_the_next_step(
    url: str, says: str, open_store: Opener
) -> None:
    with pytest.raises(StoreError) as failed:
        open_store(f"postgresql://u@{url}")
    message = str(failed.value)
    assert message.startswith(f"the store postgresql://u@{url.partition('?')[0]} failed: ")
    assert says in message and "\n" not in message and "?" not in message


def test_a_place_without_tables_is_not_changed_to_be_read(
    tmp_path: Path, open_store: Opener
) -> None:
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(StoreError, match="empty.sqlite has no runs yet; `keepwarm collect`"):
        open_store(tmp_path / "empty.sqlite", create=False)
    with closing(sqlite3.connect(tmp_path / "empty.sqlite")) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == []


# What the database refuses for what it is. The contracts let none of it through; the columns, the
# drivers and a site's own constraints have the last word.


def unchecked(make: SimpleNamespace, **changes: object) -> Incoming:
    """A batch with one verdict that no contract has looked at."""
    good = make.batch(make.verdict(0))
    fields = {**dict(good.verdicts[0]), **changes}
    verdicts = (Verdict.model_construct(**fields),)
    return Incoming(verdicts=[VerdictBatch.model_construct(**{**dict(good), "verdicts": verdicts})])


@pytest.mark.parametrize(
    "changes",
    [{"position": 2**63}, {"text": "lone \ud800"}, {"text": None}],
    ids=["over 64 bits", "a lone surrogate", "NULL"],
)
def test_a_value_that_the_database_cannot_hold_is_refused_and_not_waited_for(
    changes: dict[str, object], store: Store, make: SimpleNamespace, run: Run
) -> None:
    with pytest.raises(StoreRefused, match="refuses a value"):
        store.write(unchecked(make, **changes))
    store.write(make.incoming(make.batch(make.verdict(0))))
    assert counted(store, run) == (1, 0, 0)


@pytest.mark.parametrize("fault", ["read-only", "no table", "full", "locked"])
def test_what_may_be_mended_is_not_a_refusal(
    fault: str, open_store: Opener, make: SimpleNamespace, tmp_path: Path
) -> None:
    store = open_store()
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as other:
        with store.transaction() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 1")
            if fault == "read-only":
                connection.exec_driver_sql("PRAGMA query_only = 1")
            if fault == "full":
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        if fault == "no table":
            other.execute("DROP TABLE outcomes")
        if fault == "locked":
            other.execute("BEGIN IMMEDIATE")
        large = make.batch(*(make.verdict(n, text="long " * 1_600) for n in range(50)))
        with pytest.raises(StoreError) as failed:
            store.write(make.incoming(large))
    assert not isinstance(failed.value, StoreRefused)
