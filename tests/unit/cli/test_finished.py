from pathlib import Path

import pytest

from services.cli.finished import finished_in, nothing_finished, update_gold
from services.contracts import Claim, ContextSpec, PromptSpec, Run, load_settings
from services.producer import ClaimsFile, RejectedFile, Source, Submission
from services.store import Store

CLAIMS = [Claim(claim_id=f"c{n}", position=n, text="C.") for n in range(4)]


def test_claims_with_an_outcome_in_the_run_are_finished(stored: Path, run: Run) -> None:
    store = Store.open(load_settings(store_url=str(stored)))
    assert set(finished_in(store, run.run_id)(CLAIMS)) == {"c0", "c1"}
    assert set(finished_in(store, "run-other")(CLAIMS)) == set()
    store.close()


def test_without_a_store_nothing_is_finished() -> None:
    assert not nothing_finished(CLAIMS)


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
