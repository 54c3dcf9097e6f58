"""A file before it is sent, compared with its run in the store."""

from pathlib import Path

import pytest

from services.cli.prepare_submission import finished_in, refuse_changed_file, update_gold
from services.contracts import (
    Claim,
    ContextSpec,
    PromptSpec,
    Run,
    RunAnnouncement,
    load_settings,
)
from services.contracts.errors import InputError
from services.producer import ClaimsFile, RejectedFile, Selection, Source, Submission
from services.store import Incoming, Store

CLAIMS = [Claim(claim_id=f"c{n}", position=n, text="C.") for n in range(4)]


def test_claims_with_an_outcome_in_the_run_are_finished(stored: Path, run: Run) -> None:
    store = Store.open(load_settings(store_url=str(stored)))
    assert set(finished_in(store, run.run_id)(CLAIMS)) == {"c0", "c1"}
    assert set(finished_in(store, "run-other")(CLAIMS)) == set()
    store.close()


def test_without_a_store_nothing_is_finished() -> None:
    assert not finished_in(None, "run-1")(CLAIMS)


@pytest.mark.parametrize("started", [False, True])
def test_a_file_is_read_for_its_labels_only_when_a_run_of_it_has_outcomes(
    started: bool,
    stored: Path,
    run: Run,
    prompt: PromptSpec,
    context: ContextSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    label = prompt.label_names[0]
    file = tmp_path / "claims.jsonl"
    file.write_text(f'{{"id": "c0", "claim": "C.", "label": "{label}"}}\n')
    with (
        Source.open(str(file)) as source,
        Store.open(load_settings(store_url=str(stored))) as store,
        RejectedFile(tmp_path / "rejected.jsonl") as rejections,
    ):
        submission = Submission(ClaimsFile(source, prompt), context)
        submission.inspect(rejections)
        if started:
            monkeypatch.setattr(submission, "run", run)
        read: list[str] = []
        claims = submission.claims
        monkeypatch.setattr(submission, "claims", lambda: read.append("once more") or claims())
        update_gold(submission, store)
    assert read == (["once more"] if started else [])


@pytest.mark.parametrize(
    ("claim", "columns", "says"),
    [
        (
            "A.",
            {"evidence": "more"},
            "is read with another --column since it was submitted as run-",
        ),
        ("B.", {}, r"has changed, or is read with other flags \(--column, .*\), since it was sub"),
    ],
)
def test_the_refusal_names_the_flag_where_only_one_differs(
    claim: str, columns: dict[str, str], says: str, tmp_path: Path, context: ContextSpec
) -> None:
    path = tmp_path / "claims.csv"
    path.write_text("claim,more\nA.,E.\n")
    store = Store.open(load_settings(store_url=str(tmp_path / "store.sqlite")), create=True)
    with Source.open(str(path)) as source:
        run = Submission(ClaimsFile(source, PromptSpec()), context).run
    store.write(Incoming.of([RunAnnouncement(run=run, submission_id="sub-1")]))
    path.write_text(f"claim,more\n{claim},E.\n")
    with Source.open(str(path)) as source:
        file = ClaimsFile(source, PromptSpec(), Selection(columns=columns))
        with pytest.raises(InputError, match=says):
            refuse_changed_file(Submission(file, context), store)
    store.close()
