"""`keepwarm compare` on stores of runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from services.contracts import (
    Claim,
    DeadClaim,
    DeadReason,
    PromptSpec,
    Run,
    RunAnnouncement,
    Totals,
    Verdict,
    VerdictBatch,
    load_settings,
)
from services.contracts.proofs import verdict_proof
from services.store import Incoming, Store

Command = Callable[..., int]
Capture = pytest.CaptureFixture[str]

CLAIMS = 120
GOLD = ["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"]


def with_prompt(run: Run, name: str) -> Run:
    return run.model_copy(update={"prompt": PromptSpec(name=name)})


def write_run(directory: Path, run: Run, *, right: int, dead: int = 0) -> str:
    """A run in its own output directory, of which the first `right` verdicts are correct."""
    verdicts, proofs = [], []
    for number in range(CLAIMS - dead):
        gold = GOLD[number % 3]
        label = gold if number < right else GOLD[(number + 1) % 3]
        proofs.append(verdict_proof("0" * 24, f"Evidence {number // 2}."))
        verdicts.append(
            Verdict(
                claim_id=f"c{number}",
                position=number,
                text=f"Claim {number}.",
                gold=gold,
                label=label if number else "INVALID",
                probabilities=(0.5, 0.25, 0.25) if number else (),
                mass=0.75,
                raw_text="True",
                prompt_tokens=10,
            )
        )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id="b",
        labels=run.prompt.label_names,
        verdicts=tuple(verdicts),
        proofs=tuple(proofs),
        worker_id="node-1",
        device="Tesla T4",
        attempt=1,
        engine_seconds=2.0,
    )
    given_up = [
        DeadClaim(
            run_id=run.run_id,
            claim=Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.", gold=GOLD[0]),
            reason=DeadReason.TOO_LONG,
            detail="too long",
            worker_id="node-1",
            attempt=1,
        )
        for n in range(CLAIMS - dead, CLAIMS)
    ]
    totals = Totals(lines=CLAIMS, claims=CLAIMS, repeated=0, rejected=0)
    announcement = RunAnnouncement(run=run, submission_id=f"sub-{run.run_id}", totals=totals)
    directory.mkdir(parents=True, exist_ok=True)
    settings = load_settings(store_url=str(directory / "keepwarm.sqlite"))
    with Store.open(settings) as store:
        store.write(Incoming([announcement], [batch], given_up))
    return run.run_id


@pytest.fixture
def two(run: Run) -> tuple[str, str]:
    """Two runs, each in its own directory of results/."""
    plain = write_run(Path("results/plain"), with_prompt(run, "plain"), right=60)
    better = write_run(Path("results/better"), with_prompt(run, "better_1"), right=100, dead=4)
    return plain, better


def test_runs_in_results_are_compared_by_their_ids(
    two: tuple[str, str], keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("compare", *two, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["claims"], found["clusters"], found["correction"]) == (116, 58, "holm")
    assert [each["prompt"] for each in found["runs"]] == ["better_1", "plain"]
    assert [each["rank"] for each in found["runs"]] == [[1, 1], [2, 2]]
    assert [each["dead"] for each in found["runs"]] == [4, 0]
    (pair,) = found["pairs"]
    assert (pair["only_first_correct"], pair["only_second_correct"]) == (40, 0)
    assert pair["p_value"] == pytest.approx(2 / 2**20)


def test_a_run_is_named_by_its_output_directory_wherever_it_is(
    run: Run, tmp_path: Path, keepwarm: Command, capsys: Capture
) -> None:
    write_run(tmp_path / "elsewhere", with_prompt(run, "plain"), right=60)
    write_run(tmp_path / "results" / "better", with_prompt(run, "better"), right=100)
    assert keepwarm("compare", str(tmp_path / "elsewhere"), "results/better/", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert keepwarm("report", str(tmp_path / "elsewhere"), "--json") == 0


def test_the_same_run_in_two_stores_can_be_compared(
    run: Run, keepwarm: Command, capsys: Capture
) -> None:
    for name in ("first", "again"):
        write_run(Path(name), run, right=60)
    assert keepwarm("compare", "first", "again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["difference"] == 0


def test_a_run_that_is_named_twice_is_refused(
    two: tuple[str, str], keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("compare", "results/plain", two[0]) == 2
    assert "name each run once" in capsys.readouterr().err


def test_a_directory_with_several_runs_is_refused_with_their_ids(
    two: tuple[str, str], run: Run, keepwarm: Command, capsys: Capture
) -> None:
    other = write_run(Path("results/plain"), with_prompt(run, "other"), right=10)
    assert keepwarm("compare", "results/plain") == 6
    error = capsys.readouterr().err
    assert other in error and two[0] in error and "--store results/plain/keepwarm.sqlite" in error


def test_an_unknown_run_is_refused_with_the_next_step(
    two: tuple[str, str], keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("compare", two[0], "run-none") == 6
    assert "`keepwarm status` lists the runs" in capsys.readouterr().err


def test_two_formats_are_refused(two: tuple[str, str], keepwarm: Command, capsys: Capture) -> None:
    assert keepwarm("compare", *two, "--json", "--latex") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_screen_fits_80_columns_and_says_what_is_left_out(
    two: tuple[str, str],
    keepwarm: Command,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR")
    assert keepwarm("compare", *two) == 0
    screen = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, screen.splitlines())) <= 80
    text = " ".join(screen.split())
    assert "116 claims with gold label and verdict in every run, in 58 clusters" in text
    assert "corrected for 1 pair (Holm)" in text
    assert "A: 4 dead claims, left out; 1 INVALID verdict, counted as wrong." in text
    assert "B: 116 of 120 verdicts are compared; 1 INVALID verdict, counted as wrong." in text


def test_markdown_and_latex_have_the_numbers_of_the_screen(
    two: tuple[str, str], keepwarm: Command, capsys: Capture
) -> None:
    printed = {}
    for flag in ("--markdown", "--latex"):
        assert keepwarm("compare", *two, flag) == 0
        printed[flag] = capsys.readouterr().out
    markdown, latex = printed.values()
    assert "| A | better_1 |" in markdown
    assert r"A & better\_1 &" in latex
    for text in (markdown, latex):
        assert "0.853 [" in text
        assert f"B: {two[0]}" in text
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == 2
    assert "<" not in re.sub(r"\$<\$", "", latex.partition(r"\begin")[2])
    # Each row has as many cells as its header.
    for table in markdown.split("\n\n")[:2]:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_names_from_outside_are_escaped(run: Run, keepwarm: Command, capsys: Capture) -> None:
    write_run(Path("one"), with_prompt(run, "a|b_{c} 50%\n\x1b[31m$&#~^\\"), right=60)
    assert keepwarm("compare", "one", "--markdown") == 0
    assert r"| a\|b_{c} 50% �[31m$&#~^\\ |" in capsys.readouterr().out
    assert keepwarm("compare", "one", "--latex") == 0
    escaped = r"a|b\_\{c\} 50\% �[31m\$\&\#\textasciitilde{}\textasciicircum{}\textbackslash{} &"
    assert escaped in capsys.readouterr().out


def test_of_many_pairs_the_screen_shows_those_with_the_first_run(
    run: Run, keepwarm: Command, capsys: Capture
) -> None:
    names = [f"out-{number}" for number in range(7)]
    for number, name in enumerate(names):
        write_run(Path(name), with_prompt(run, name), right=60 + number)
    assert keepwarm("compare", *names) == 0
    screen = capsys.readouterr().out
    assert "A and G" in screen and "B and C" not in screen and "All 21 pairs: --json" in screen
    assert keepwarm("compare", *names, "--markdown") == 0
    assert "B and C" in capsys.readouterr().out


def test_calibration_is_of_the_claims_with_probabilities(
    two: tuple[str, str], keepwarm: Command, capsys: Capture
) -> None:
    assert keepwarm("compare", *two, "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["calibration"] is None
    assert keepwarm("compare", *two, "--calibration", "--json") == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]["calibration"]
    assert found["left_out"] == 1  # the INVALID verdict
    assert found["selection_claims"] + found["report_claims"] == 115
    assert keepwarm("compare", *two, "--calibration") == 0
    screen = capsys.readouterr().out
    for words in ("as stored", "batch calibration", "temperature", "calibration without 1 claim"):
        assert words in screen
