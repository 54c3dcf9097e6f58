"""Dead claims and cancelled runs, as far as no broker is needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

import pytest

from services.broker import Outgoing
from services.cli import dead
from services.contracts import Claim, DeadClaim, DeadReason, Run, load_settings
from services.contracts.bounds import MAX_MESSAGE_BYTES
from services.store import Incoming, Store, dead_claims, run_status

Command = Callable[..., int]
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def database(stored: Path, run: Run) -> Store:
    """Of three claims two are answered and one is dead; two more died of another run."""
    store = Store.open(load_settings(store_url=str(stored)))
    store.write(
        Incoming(
            dead=[
                DeadClaim(
                    run_id=run_id,
                    claim=Claim(
                        claim_id=claim_id,
                        position=2,
                        text="Claim [b]2[/b].",
                        evidence="Evidence 2.",
                    ),
                    reason=DeadReason.ENGINE_FAILED,
                    detail="it failed 3 times\nSegmentation fault",
                    worker_id="node-1",
                    attempt=1,
                    failures=3,
                )
                for run_id, claim_id in (
                    (run.run_id, "c[2]"),
                    ("run-other", "o1"),
                    ("run-other", "o2"),
                )
            ]
        )
    )
    return store


@pytest.fixture
def say(
    database: Store, stored: Path, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> Iterator[Say]:
    """Exit code and words of a command on that store."""

    def words(*arguments: str) -> tuple[int, str]:
        code = keepwarm(*arguments, "--store", str(stored))
        seen = capsys.readouterr()
        return code, seen.out + seen.err

    yield words
    database.close()


def listed(database: Store) -> list[str]:
    return [row.claim.claim_id for row in dead_claims(database)]


def test_dead_claims_are_listed_with_the_first_line_of_what_killed_them(say: Say, run: Run) -> None:
    code, shown = say("dead", "list")
    assert code == 0
    assert all(part in shown for part in (run.run_id, "c[2]", "run-other", "o1", "o2"))
    assert "engine-failed" in shown and "it failed 3 times" in shown
    assert "Segmentation" not in shown


def test_dead_claims_of_one_run_are_listed_alone(say: Say) -> None:
    code, shown = say("dead", "list", "other")
    assert code == 0
    assert "o1" in shown and "c[2]" not in shown


def test_a_dead_claim_is_shown_whole(say: Say, run: Run) -> None:
    code, shown = say("dead", "show", run.run_id, "c[2]")
    assert code == 0
    assert shown.splitlines() == [
        f"run: {run.run_id}",
        "claim: c[2] (line 3)",
        "reason: engine-failed",
        "engine failures: 3",
        "it failed 3 times",
        "Segmentation fault",
        "text: Claim [b]2[/b].",
        "evidence: Evidence 2.",
    ]


def test_the_claim_to_show_has_to_be_named(say: Say, run: Run) -> None:
    code, shown = say("dead", "show", run.run_id)
    assert code == 2
    assert "name a claim of the run" in shown


@pytest.mark.parametrize("verb", ["show", "retry", "drop"])
def test_a_claim_that_is_not_dead_is_reported(
    verb: str, say: Say, run: Run, database: Store
) -> None:
    code, shown = say("dead", verb, run.run_id, "c0")
    assert code == 6
    assert f"{run.run_id} does not have c0 among its dead claims" in shown
    assert len(listed(database)) == 3


def test_claims_that_are_let_go_are_not_listed_any_more(
    say: Say, run: Run, database: Store
) -> None:
    code, shown = say("dead", "drop", run.run_id)
    assert (code, shown) == (0, f"1 claims of {run.run_id} are no longer listed\n")
    assert listed(database) == ["o1", "o2"]
    assert say("dead", "drop", run.run_id)[0] == 6
    status = run_status(database, run.run_id)
    assert status is not None and (status.dead, status.complete) == (1, True)


def test_claims_of_a_run_that_was_never_announced_cannot_be_tried_again(say: Say) -> None:
    # Its prompt and its context came with no message: there is nothing to send.
    code, shown = say("dead", "retry", "run-other", "o1")
    assert code == 6
    assert "run-other" in shown


@pytest.mark.parametrize("verb", ["show", "retry", "drop"])
def test_for_a_dead_message_a_broker_has_to_be_named(verb: str, say: Say) -> None:
    code, shown = say("dead", verb, "msg-01234567")
    assert code == 2
    assert "no broker is configured" in shown


def test_a_retry_that_reaches_no_broker_leaves_the_claims_dead(
    say: Say, run: Run, database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_BROKER_CONNECT_TIMEOUT_SECONDS", "0.2")
    code, _ = say("dead", "retry", run.run_id, "--broker", "amqp://127.0.0.1:1/v")
    assert code == 5
    assert "c[2]" in listed(database)


class RecordingPublisher:
    sent: ClassVar[list[Outgoing]] = []

    def __init__(self, *_: object, **__: object) -> None:
        self.sent.clear()

    @contextmanager
    def open(self, *_: object) -> Iterator[Self]:
        yield self

    def publish(self, message: Outgoing) -> None:
        self.sent.append(message)

    def flush(self, *_: object) -> None: ...


def test_a_retry_of_claims_with_long_evidence_fits_the_size_of_a_message(
    say: Say, run: Run, database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead, "Publisher", RecordingPublisher)
    long = [
        DeadClaim(
            run_id=run.run_id,
            claim=Claim(claim_id=f"long-{n}", position=n, text="C.", evidence="漢" * 60_000),
            reason=DeadReason.TOO_LONG,
            detail="too long",
            worker_id="node-1",
            attempt=1,
            failures=0,
        )
        for n in range(60)
    ]
    database.write(Incoming(dead=long))
    code, shown = say("dead", "retry", run.run_id, "--broker", "amqp://localhost")
    assert (code, shown) == (0, f"61 claims of {run.run_id} are sent again\n")
    assert len(RecordingPublisher.sent) > 1
    assert all(len(message.body) <= MAX_MESSAGE_BYTES for message in RecordingPublisher.sent)


def test_without_dead_claims_the_list_is_a_sentence(
    stored: Path, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("dead", "list", "--store", str(stored)) == 0
    assert capsys.readouterr().out == "no dead claims\n"


def test_a_run_that_is_cancelled_is_so_at_once_and_keeps_its_verdicts(
    say: Say, run: Run, database: Store
) -> None:
    code, shown = say("cancel", run.run_id[:10])
    assert code == 0
    assert shown == f"{run.run_id} is cancelled; the collector notifies the workers\n"
    status = run_status(database, run.run_id)
    assert status is not None
    assert (status.cancelled, status.done) == (True, 2)
    assert database.is_active("sub-1") is False


def test_an_unknown_run_cannot_be_cancelled(say: Say) -> None:
    assert say("cancel", "zzz")[0] == 6
