from pathlib import Path

import pytest

from services.cli.run import claims_to_repeat
from services.contracts import (
    INVALID,
    Claim,
    ContextSpec,
    DeadClaim,
    DeadReason,
    PromptSpec,
    Run,
    RunAnnouncement,
    Settings,
    Verdict,
    VerdictBatch,
    load_settings,
)
from services.contracts.errors import InputError, StoreError, UsageError
from services.producer import ClaimsFile, RejectedFile, Selection, Source, Submission
from services.store import Incoming, Store

PROMPT = PromptSpec()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(store_url=str(tmp_path / "store.sqlite"))


@pytest.fixture
def run(settings: Settings) -> Run:
    """Claim a is answered, b is INVALID, c is dead."""
    run = Run(source="f", source_digest="s", context=ContextSpec(model="m"), prompt=PROMPT)
    verdicts = tuple(
        Verdict(
            claim_id=claim_id,
            position=0,
            text="C.",
            label=label,
            probabilities=(),
            mass=0.0,
            raw_text="x",
            prompt_tokens=1,
        )
        for claim_id, label in (("a", "SUPPORTS"), ("b", INVALID))
    )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id="1",
        labels=PROMPT.label_names,
        verdicts=verdicts,
        worker_id="w",
        device="d",
        attempt=1,
        engine_seconds=1.0,
    )
    dead = DeadClaim(
        run_id=run.run_id,
        claim=Claim(claim_id="c", position=2, text="C."),
        reason=DeadReason.TOO_LONG,
        detail="",
        worker_id="w",
        attempt=1,
    )
    with Store.open(settings) as store:
        announced = RunAnnouncement(run=run, submission_id="sub")
        store.write(Incoming(announcements=[announced], verdicts=[batch], dead=[dead]))
    return run


@pytest.mark.parametrize(
    ("only", "ids"),
    [("invalid", "b"), ("dead", "c"), ("invalid,dead", "bc"), ("dead, invalid", "bc")],
)
def test_the_claims_that_a_run_could_not_answer_are_known(
    only: str, ids: str, settings: Settings, run: Run
) -> None:
    assert claims_to_repeat(settings, only, run.run_id) == set(ids)


def test_without_the_flags_all_claims_are_meant(settings: Settings) -> None:
    assert claims_to_repeat(settings, None, None) is None


@pytest.mark.parametrize(("only", "from_run"), [("dead", None), (None, "run-1")])
def test_only_and_from_are_refused_alone(
    only: str | None, from_run: str | None, settings: Settings
) -> None:
    with pytest.raises(UsageError, match="go together: --only invalid,dead --from RUN"):
        claims_to_repeat(settings, only, from_run)


def test_another_kind_of_claims_is_refused_by_name(settings: Settings) -> None:
    with pytest.raises(UsageError, match="--only takes invalid and dead, not 'bad'"):
        claims_to_repeat(settings, "dead,bad", "run-1")


def test_a_run_that_is_not_there_is_reported(settings: Settings, run: Run) -> None:
    with pytest.raises(StoreError, match="run-unknown"):
        claims_to_repeat(settings, "dead", "run-unknown")


def test_a_run_without_such_claims_has_nothing_to_repeat(settings: Settings) -> None:
    run = Run(source="f", source_digest="s", context=ContextSpec(model="m"), prompt=PROMPT)
    with Store.open(settings) as store:
        store.write(Incoming(announcements=[RunAnnouncement(run=run, submission_id="sub")]))
    with pytest.raises(InputError, match="has no dead claims, so there is nothing to repeat"):
        claims_to_repeat(settings, "dead", run.run_id)


def test_only_the_wanted_claims_are_read_and_that_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    path.write_text('{"id": "a", "claim": "A."}\nnonsense\n{"id": "b", "claim": "B."}\n')
    digests = set()
    for only, ids in ((None, ["a", "b"]), (frozenset("b"), ["b"])):
        with Source.open(str(path)) as source:
            file = ClaimsFile(source, PROMPT, Selection(only=only))
            assert [claim.claim_id for claim in file] == ids
            digests.add(file.source_digest)
    assert len(digests) == 2


def test_a_file_with_none_of_the_wanted_claims_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"id": "a", "claim": "A."}\nnonsense\n')
    with Source.open(str(path)) as source:
        file = ClaimsFile(source, PROMPT, Selection(only=frozenset("b")))
        submission = Submission(file, ContextSpec(model="m"))
        rejections = RejectedFile(tmp_path / "rejected.jsonl")
        with (
            rejections,
            pytest.raises(InputError, match="none of the claims that --only selects .* is in"),
        ):
            submission.inspect(rejections)
