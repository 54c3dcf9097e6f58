"""`keepwarm sweep` without a broker and an engine: the plan, and the results of what is stored."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.cli.cells import Cell, prepared_cells
from services.cli.screen import Screen
from services.cli.sweep_file import SweepFile
from services.contracts import (
    Claim,
    RunAnnouncement,
    Totals,
    Verdict,
    VerdictBatch,
    load_settings,
)
from services.contracts.errors import EngineError, InputError, KeepwarmError, RunIncomplete
from services.local.local_run import LocalRun
from services.store import Incoming, Store, run_status

Keepwarm = Callable[..., int]
Captured = pytest.CaptureFixture[str]
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
CLAIMS = 12
STORE = Path("results/study/keepwarm.sqlite")


def prompt_text(name: str, instructions: str = "Judge.") -> str:
    return (
        f'name: {name}\ninstructions: {instructions}\ntemplate: "{{claim}} Answer:"\nchat: false\n'
    )


@pytest.fixture
def study(model_dir: Path) -> Path:
    """A sweep file of two prompts and one model in the working directory, and what it names."""
    lines = [
        {"id": n, "claim": f"Claim {n}.", "evidence": f"E{n // 2}", "label": LABELS[n % 3]}
        for n in range(CLAIMS)
    ]
    Path("claims.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name in ("long", "short"):
        Path(f"{name}.yaml").write_text(prompt_text(name))
    return write_study(models=[str(model_dir)])


def write_study(**changes: Any) -> Path:
    content = {"claims": "claims.jsonl", "prompts": ["long.yaml", "short.yaml"]} | changes
    Path("study.yaml").write_text(json.dumps(content))
    return Path("study.yaml")


@contextmanager
def cells_of(study: Path) -> Any:
    screen = Screen(stderr=True)
    with prepared_cells(screen, load_settings(), study, SweepFile.read(study)) as cells:
        yield cells


def answer(
    store: Store, cell: Cell, label_of: Callable[[Claim], str | None], *, mass: float = 1.0
) -> None:
    """Store a verdict for each claim for which `label_of` has a label."""
    run, claims = cell.submission.run, [*cell.submission.file]
    labels = {claim: label for claim in claims if (label := label_of(claim)) is not None}
    verdicts = tuple(
        Verdict(
            claim_id=claim.claim_id,
            position=claim.position,
            text=claim.text,
            gold=claim.gold,
            label=label,
            probabilities=(1.0, *[0.0] * (len(run.prompt.labels) - 1)),
            mass=mass,
            raw_text="x",
            prompt_tokens=10,
        )
        for claim, label in labels.items()
    )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id="b",
        labels=run.prompt.label_names,
        verdicts=verdicts,
        worker_id="w",
        device="Tesla T4",
        attempt=1,
        engine_seconds=2.0,
    )
    totals = Totals(lines=len(claims), claims=len(claims), repeated=0, rejected=0)
    announced = RunAnnouncement(run=run, submission_id=f"sub-{run.run_id}", totals=totals)
    store.write(Incoming([announced], [batch] if verdicts else []))


def right(claim: Claim) -> str | None:
    return claim.gold


def supports(_: Claim) -> str:
    return "SUPPORTS"


def store_study(study: Path, *answers: Callable[[Claim], str | None], **how: float) -> None:
    """Store answers of each cell, where a sweep would find them."""
    STORE.parent.mkdir(parents=True, exist_ok=True)
    with Store.open(load_settings(store_url=str(STORE))) as store, cells_of(study) as cells:
        for cell, label_of in zip(cells, answers, strict=True):
            answer(store, cell, label_of, **how)


def result() -> Mapping[str, Any]:
    return json.loads(Path("results/study/sweep.json").read_text())


def test_a_sweep_of_which_all_is_stored_computes_nothing_and_orders_the_cells(
    study: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    store_study(study, supports, right)
    assert keepwarm("sweep", str(study)) == 0
    seen = capsys.readouterr()
    assert "Every claim has an outcome already." in seen.err
    assert "Results are in results/study/" in seen.err
    header, best, second, *notes = seen.out.splitlines()
    assert header.split() == ["prompt", "accuracy", "95", "%", "interval", "claims"]
    assert best.split() == ["short", "1.000", "0.758", "to", "1.000", "12"]
    assert second.split() == ["long", "0.333", "0.138", "to", "0.609", "12"]
    assert "The best of several cells looks better than it is" in notes[0]
    cells = result()["cells"]
    assert [cell["prompt"] for cell in cells] == ["short", "long"]
    for cell in cells:
        assert cell["complete"] and cell["error"] is None and cell["selected"] is None
        directory = Path("results/study") / cell["directory"]
        assert cell["directory"].startswith(f"{cell['prompt']}-model-")
        report = json.loads((directory / "report.json").read_text())
        assert report["status"]["run_id"] == cell["run_id"]
        assert report["quality"]["accuracy"] == cell["quality"]["accuracy"]
        assert len((directory / "verdicts.jsonl").read_text().splitlines()) == CLAIMS


def test_with_a_selection_one_part_orders_the_cells_and_the_other_is_reported(
    study: Path, model_dir: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    study = write_study(models=[str(model_dir)], select=0.5)
    assert keepwarm("sweep", str(study), "--plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["selected"] == 6
    # `long` is right on the selected claims only, `short` on the others only.
    with cells_of(study) as cells:
        from services.producer.selected_claims import selected_claims

        selected = selected_claims(cells[0].submission.file, 0.5, 0)
    wrong = {"SUPPORTS": "REFUTES", "REFUTES": "SUPPORTS", "NOT ENOUGH INFO": "SUPPORTS"}

    def right_on_selected(claim: Claim) -> str:
        assert claim.gold is not None
        return claim.gold if claim.claim_id in selected else wrong[claim.gold]

    def right_on_others(claim: Claim) -> str:
        assert claim.gold is not None
        return wrong[claim.gold] if claim.claim_id in selected else claim.gold

    store_study(study, right_on_selected, right_on_others)
    assert keepwarm("sweep", str(study)) == 0
    seen = capsys.readouterr()
    header, best, second, *notes = seen.out.splitlines()
    assert header.split()[:4] == ["prompt", "selected", "by", "accuracy"]
    assert best.split()[:3] == ["long", "1.000", "0.000"]
    assert second.split()[:3] == ["short", "0.000", "1.000"]
    assert "the accuracy on 6 selected claims" in notes[0]
    best, second = result()["cells"]
    assert (best["selected"]["correct"], best["selected"]["labelled"]) == (6, 6)
    assert (best["quality"]["correct"], best["quality"]["labelled"]) == (0, 6)
    assert result()["selected"] == 6


def test_the_plan_says_what_is_known_and_shows_prompts_tokens_and_label_tokens(
    study: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    assert keepwarm("sweep", str(study), "--plan", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert not Path("results").exists()
    assert [(cell["prompt"], cell["claims"], cell["known"]) for cell in first["cells"]] == [
        ("long", 12, 0),
        ("short", 12, 0),
    ]
    assert first["cells"][0]["examples"] == [
        "Judge.\n\nClaim 0. Answer:",
        "Judge.\n\nClaim 1. Answer:",
    ]
    assert [*first["cells"][0]["label_tokens"]] == [*LABELS]
    (model,) = first["models"]
    assert model["model"] == "model" and model["rates"] == [] and model["hours"] == {}
    tokens = [cell["tokens"]["total"] for cell in first["cells"]]
    assert model["tokens_left"] == sum(tokens) > 0

    def half(claim: Claim) -> str | None:
        return claim.gold if claim.position < 6 else None

    store_study(study, right, half)
    assert keepwarm("sweep", str(study), "--plan", "--json") == 0
    later = json.loads(capsys.readouterr().out)
    assert [cell["known"] for cell in later["cells"]] == [12, 6]
    (model,) = later["models"]
    assert model["tokens_left"] == round(tokens[1] / 2)
    (rate,) = model["rates"]
    assert (rate["device"], rate["claims"], rate["prompt_tokens"]) == ("Tesla T4", 18, 180)
    hours = model["tokens_left"] * rate["seconds"] / rate["prompt_tokens"] / 3600
    assert model["hours"] == {"Tesla T4": pytest.approx(hours)}


def test_the_plan_fits_eighty_columns_and_says_what_is_not_known(
    study: Path, keepwarm: Keepwarm, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert keepwarm("sweep", str(study), "--plan") == 0
    shown = capsys.readouterr().out
    assert "2 cells: 2 prompts x 1 model; 24 claims in all, 0 with an outcome already" in shown
    assert "model: weights not on this machine, memory of an engine not known" in shown
    assert "hours not known: the store has no verdict of this model yet" in shown
    assert "--- claim 1, as the model sees it ---\nJudge.\n\nClaim 0. Answer:" in shown
    assert "\nlong: label tokens SUPPORTS ' True', REFUTES ' False', NOT ENOUGH" in shown


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": ["long.yaml", "long.yaml"]}, "prompts: number 2, 'long', is the same as"),
        ({"prompts": ["none.yaml"]}, "the prompt file none.yaml cannot be read"),
        ({"claims": "none.jsonl"}, "study.yaml: claims: none.jsonl does not exist"),
        ({"claims": {"file": "claims.jsonl", "format": "fevre"}}, "claims: format fevre: there is"),
        ({"claims": {"file": "claims.jsonl", "seed": 1}}, "set limit as well"),
        (
            {"claims": {"file": "claims.jsonl", "label_map": {"X": "MAYBE"}}},
            "claims: label_map X=MAYBE: the prompt 'long' has no label 'MAYBE'",
        ),
        (
            {"claims": {"file": "claims.jsonl", "columns": {"claim": "statement"}}},
            "claims: claims.jsonl: no line has the key 'statement'",
        ),
        ({"models": [{"max_model_tokens": 1}]}, "models: max_model_tokens: Input should be gre"),
        ({"models": [{"adapter_revision": "x"}]}, "models: adapter_revision needs an adapter"),
        ({"select": 0.01}, "study.yaml: select: 0.01 of 12 claims cannot be selected"),
    ],
)
def test_an_error_names_the_file_and_the_key_before_anything_is_started(
    changes: Mapping[str, Any],
    says: str,
    study: Path,
    model_dir: Path,
    keepwarm: Keepwarm,
    capsys: Captured,
) -> None:
    study = write_study(**{"models": [str(model_dir)]} | changes)
    assert keepwarm("sweep", str(study), "--plan") == InputError.exit_code
    shown = capsys.readouterr().err
    assert says in shown
    assert "--label-map" not in shown and "--column" not in shown


def test_two_prompts_with_one_name_are_refused(
    study: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    Path("short.yaml").write_text(prompt_text("long", "Judge it."))
    assert keepwarm("sweep", str(study), "--plan") == InputError.exit_code
    assert "number 1 and number 2 have the name 'long'" in capsys.readouterr().err


def test_one_model_under_two_names_is_refused(
    study: Path, model_dir: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    entries = [{"model": str(model_dir), "name": name} for name in "ab"]
    assert keepwarm("sweep", str(write_study(models=entries)), "--plan") == InputError.exit_code
    assert "models: number 2, 'b', is the same as number 1" in capsys.readouterr().err


def test_models_are_told_apart_in_the_table(
    study: Path, model_dir: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    entries = [
        {"model": str(model_dir)},
        {"model": str(model_dir), "dtype": "float32", "name": "f32"},
    ]
    store_study(write_study(models=entries), supports, right, supports, supports)
    assert keepwarm("sweep", "study.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["prompt", "model"]
    assert lines[1].split()[:3] == ["short", "model", "1.000"]
    assert {cell["name"] for cell in result()["cells"]} == {
        *("long, model", "short, model", "long, f32", "short, f32")
    }


def test_cells_with_other_labels_are_said_to_be_scored_on_other_claims(
    study: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    labels = "labels: [{name: SUPPORTS, word: 'True'}, {name: REFUTES, word: 'False'}]\n"
    Path("short.yaml").write_text(prompt_text("short") + labels)

    store_study(study, right, supports)
    assert keepwarm("sweep", str(study)) == 0
    seen = capsys.readouterr()
    assert "Cells are scored on different claims" in seen.out
    assert seen.err.count("claims.jsonl: claims (JSONL), 12 records") == 1
    assert "short: labels SUPPORTS: 4, REFUTES: 4; left out of the scores" in seen.err


def test_claims_without_labels_have_no_accuracy(
    study: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    Path("claims.jsonl").write_text('{"claim": "A."}\n{"claim": "B."}\n')
    store_study(study, supports, supports)
    assert keepwarm("sweep", str(study)) == 0
    assert "No accuracy: no verdict is on a claim with a gold label" in capsys.readouterr().out


def test_label_words_with_no_probability_fail_the_sweep_unless_they_are_allowed(
    study: Path, keepwarm: Keepwarm, capsys: Captured
) -> None:
    store_study(study, right, right, mass=0.001)
    assert keepwarm("sweep", str(study)) == 8
    seen = capsys.readouterr()
    assert "Warning: long: the labels have 0.1 % of the probability" in seen.err
    assert "keepwarm: long: the labels have 0.1 %" in seen.err
    assert keepwarm("sweep", str(study), "--allow-low-mass") == 0


def fails(monkeypatch: pytest.MonkeyPatch, *errors: KeepwarmError | None) -> None:
    """Let the runs of a sweep, in order, fail with these errors."""

    def run(self: LocalRun) -> None:
        for submission, error in zip(self._submissions, errors, strict=True):
            if error is not None:
                self.failures[submission.run.run_id] = error

    monkeypatch.setattr(LocalRun, "run", run)


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ((None, RunIncomplete("it was cancelled")), 7),
        ((RunIncomplete("it was cancelled"), EngineError("no engine")), 4),
    ],
)
def test_the_exit_code_is_the_lowest_of_the_cells(
    errors: tuple[KeepwarmError | None, ...],
    code: int,
    study: Path,
    keepwarm: Keepwarm,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_study(study, right, right)
    fails(monkeypatch, *errors)
    assert keepwarm("sweep", str(study)) == code
    assert f"keepwarm: short: {errors[1]}" in capsys.readouterr().err


def test_a_stopped_sweep_writes_what_there_is_and_says_how_to_resume(
    study: Path, keepwarm: Keepwarm, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_study(study, right, right)
    with Store.open(load_settings(store_url=str(STORE))) as store, cells_of(study) as cells:
        assert all(run_status(store, cell.run_id) for cell in cells)
    monkeypatch.setattr(LocalRun, "run", lambda _: 2)
    assert keepwarm("sweep", str(study)) == 130
    assert "Stopped. Rerun the same command to resume the sweep." in capsys.readouterr().err
    assert len(result()["cells"]) == 2


def test_the_results_go_where_the_file_or_the_flag_says(
    study: Path, model_dir: Path, keepwarm: Keepwarm
) -> None:
    fails_never = write_study(models=[str(model_dir)], out="mine")
    Path("mine").mkdir()
    store_study(fails_never, right, right)
    STORE.rename("mine/keepwarm.sqlite")
    assert keepwarm("sweep", "study.yaml") == 0
    assert Path("mine/sweep.json").exists()
    Path("mine").rename("other")
    assert keepwarm("sweep", "study.yaml", "--out", "other") == 0
