import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.contracts import Run, errors
from services.contracts.errors import KeepwarmError

VERBS = (
    *("run", "sweep", "submit", "worker", "collect", "status", "report", "export", "cancel"),
    "compare",
    *("contexts list", "contexts warm", "contexts evict", "contexts logs", "keeper"),
    *("contexts prune", "prompt show"),
    *("dead list", "dead show", "dead retry", "dead drop", "broker setup", "doctor"),
)
FLAGS = {
    "run": (
        "FILE",
        "--model",
        "--prompt",
        "--limit",
        "--batch-size",
        "--workers",
        "--out",
        "--broker",
    ),
    "sweep": ("FILE", "--plan", "--json", "--workers", "--out", "--broker", "--store"),
    "submit": ("FILE", "--model", "--prompt", "--limit", "--batch-size", "--broker", "--column"),
    "worker": ("--model", "--broker", "--max-model-tokens", "--engine-argument"),
    "collect": ("--broker", "--store", "--until"),
    "status": ("--json", "--watch", "--store"),
    "report": ("RUN", "--json", "--store"),
    "compare": ("RUN...", "--json", "--markdown", "--latex", "--correction", "--store"),
    "export": ("RUN", "--format", "--out", "--store"),
    "cancel": ("RUN", "--store"),
    "contexts list": ("--json",),
    "contexts warm": ("--model", "--max-model-tokens", "--engine-argument"),
    "contexts evict": ("NAME", "--all"),
    "contexts logs": ("NAME",),
    "contexts prune": ("--older-than", "--dry-run"),
    "keeper": (),
    "prompt show": ("PROMPT", "--model", "--claim", "--evidence", "--file", "--json"),
    "dead list": ("RUN", "--broker", "--store"),
    "dead show": ("RUN|MESSAGE", "--broker", "--store"),
    "dead retry": ("RUN|MESSAGE", "CLAIM", "--broker", "--store"),
    "dead drop": ("RUN|MESSAGE", "CLAIM", "--broker", "--store"),
    "broker setup": ("--admin", "--vhost"),
    "doctor": ("--json",),
}

Command = Callable[..., int]


def test_the_help_names_every_verb_and_every_exit_code() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(verb.split()[0] in shown.output for verb in VERBS)
    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, KeepwarmError)
    }
    text = " ".join(shown.output.split())
    assert all(f" {code} " in text for code in codes | {130, 143})


def test_it_tells_its_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"keepwarm {version('keepwarm')}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_its_help(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert shown.exit_code == 0
    assert all(flag in shown.output for flag in FLAGS[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_no_help_shows_mark_up_or_leaves_something_out(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"]).output
    assert "[dim]" not in shown
    assert "[/" not in shown
    if "--broker" in FLAGS[verb]:
        assert "amqp[s]://" in shown
        assert "[env: KEEPWARM_BROKER_URL]" in shown


def test_without_a_verb_the_help_is_shown() -> None:
    shown = CliRunner().invoke(app, [])
    assert "Usage:" in shown.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "a", "b"],
        ["run", "a", "--limit", "0"],
        ["run", "a", "--limit", "many"],
        ["run", "a", "--workers", "0"],
        ["run", "a", "--batch-size", "0"],
        ["run", "a", "--batch-size", "5000"],
        ["run", "a", "--dtype", "int8"],
        ["run", "a", "--max-model-tokens", "15"],
        ["run", "a", "--format", "xml"],
        ["run", "a", "--seed", "7"],
        ["submit", "a", "--seed", "7"],
        ["worker", "--max-model-tokens", "20000000", "--model", "/m"],
        ["worker", "--model", "/" + "m" * 600],
        ["worker", "--revision", "", "--model", "/m"],
        ["worker", "--no-such-flag"],
        ["status", "--every", "0"],
        ["status", "--store", "mysql://u@h/d"],
        ["report"],
        ["export", "run-1"],
        ["cancel"],
        ["dead", "fly"],
        ["prompt", "show"],
        ["dead", "show"],
        ["dead", "retry"],
        ["dead", "drop"],
        ["export", "run-1", "--format", "xml"],
    ],
    ids=" ".join,
)
def test_a_bad_flag_ends_with_2(arguments: list[str], keepwarm: Command) -> None:
    assert keepwarm(*arguments) == 2


@pytest.mark.parametrize("verb", ["run", "submit", "contexts warm"])
def test_a_context_that_is_out_of_bounds_names_the_help_of_its_verb(
    verb: str, keepwarm: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "claims.jsonl").write_text('{"claim": "C."}\n')
    file = [] if verb == "contexts warm" else ["claims.jsonl"]
    assert keepwarm(*verb.split(), *file, "--max-model-tokens", "10000001") == 2
    assert f"see `keepwarm {verb} --help`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run a", "submit a", "worker", "collect"])
@pytest.mark.parametrize(
    "url", ["amqp://u:hunter2@h/", "amqps://:hunter2@h", "amqp://u:hunter2@h:99999/v"]
)
def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    verb: str, url: str, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm(*verb.split(), "--broker", url) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "every user of this machine can read passwords" in shown
    assert "KEEPWARM_BROKER_PASSWORD" in shown
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:hunter2@h/d", "postgresql://u@h/d?password=hunter2"],
)
def test_a_stores_password_on_the_command_line_is_refused(
    url: str, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("status", "--store", url) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_a_broker_that_is_no_url_ends_with_2(keepwarm: Command) -> None:
    assert keepwarm("collect", "--store", "s.sqlite", "--broker", "amqp://[bad") == 2


def test_a_bad_setting_ends_with_2_and_its_name(
    keepwarm: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEEPWARM_BATCH_SIZE", "none")
    assert keepwarm("status") == 2
    assert capsys.readouterr().err.startswith("keepwarm: KEEPWARM_BATCH_SIZE: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "none.jsonl"], "none.jsonl does not exist"),
        (["run", "."], ". is a directory"),
        (["run", "none.jsonl", "--prompt", "none.yaml"], "the prompt file none.yaml cannot be"),
        (["submit", "x", "--prompt", "none.yaml"], "the prompt file none.yaml cannot be read"),
    ],
)
def test_a_bad_file_ends_with_3(
    arguments: list[str], says: str, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm(*arguments) == 3
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["run", "claims.jsonl"], ["submit", "claims.jsonl"], ["worker"]],
    ids=lambda arguments: arguments[0],
)
def test_a_model_that_is_not_there_ends_with_4(
    arguments: list[str], keepwarm: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "claims.jsonl").write_text('{"claim": "C."}\n')
    assert keepwarm(*arguments, "--model", "/no/such/model") == 4
    assert "there is no model at /no/such/model" in capsys.readouterr().err


STORE_READERS = (
    ["status"],
    ["report", "x"],
    ["export", "x", "--format", "csv"],
    ["cancel", "x"],
    ["dead", "list"],
    ["dead", "show", "x", "c1"],
    ["dead", "retry", "x"],
    ["dead", "drop", "x"],
)


def test_a_store_that_is_not_there_ends_with_6(
    keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in STORE_READERS:
        assert keepwarm(*arguments, "--store", "none.sqlite") == 6
        assert "there is no store at none.sqlite" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback(
    keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    keepwarm("run", "a", "--seed", "7")
    assert capsys.readouterr().err == (
        "keepwarm: --seed takes a random sample and needs its size; set --limit as well\n"
    )


# Verbs that only read the store.


def test_status_tells_of_every_run(
    stored: Path, run: Run, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("status", "--store", str(stored)) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in (run.run_id, "claims.jsonl", "left"))


def test_status_is_json_where_it_is_asked_for(
    stored: Path, run: Run, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("status", "--json", "--store", str(stored)) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["run_id"], status["done"], status["total"]) == (run.run_id, 2, 3)
    assert (status["rejected"], status["complete"]) == (1, False)


def test_the_store_may_be_named_in_the_environment(
    stored: Path,
    keepwarm: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KEEPWARM_STORE_URL", str(stored))
    assert keepwarm("status", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_report_shows_a_run_to_a_person_or_a_program(
    stored: Path, run: Run, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("report", run.run_id[:8], "--store", str(stored)) == 0
    assert "accuracy" in capsys.readouterr().out
    assert keepwarm("report", run.run_id, "--json", "--store", str(stored)) == 0
    assert json.loads(capsys.readouterr().out)["quality"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("format", "suffix"),
    [("jsonl", "jsonl"), ("csv", "csv"), ("parquet", "parquet"), ("fever", "fever.jsonl")],
)
def test_export_writes_a_file_named_by_the_run_and_the_format(
    format: str,
    suffix: str,
    stored: Path,
    run: Run,
    keepwarm: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert keepwarm("export", run.run_id, "--format", format, "--store", str(stored)) == 0
    assert (tmp_path / f"{run.run_id}.{suffix}").is_file()
    assert capsys.readouterr().err == f"2 rows in {run.run_id}.{suffix}\n"


@pytest.mark.parametrize("format", ["jsonl", "csv", "fever", "parquet"])
def test_export_writes_to_standard_output(
    format: str,
    keepwarm: Command,
    stored: Path,
    run: Run,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    arguments = ("--format", format, "--store", str(stored))
    assert keepwarm("export", run.run_id, *arguments, "--out", "file") == 0
    assert keepwarm("export", run.run_id, *arguments, "--out", "-") == 0
    shown = capfdbinary.readouterr()
    assert shown.out == Path("file").read_bytes()
    assert b" rows in standard output" in shown.err
    assert not Path("-").exists()


def test_export_writes_to_the_given_path(
    stored: Path, run: Run, keepwarm: Command, tmp_path: Path
) -> None:
    arguments = ["--format", "jsonl", "--out", "deep/er.jsonl", "--store", str(stored)]
    assert keepwarm("export", run.run_id, *arguments) == 0
    assert len((tmp_path / "deep" / "er.jsonl").read_text().splitlines()) == 2


def test_an_unknown_run_ends_with_6(
    stored: Path, run: Run, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("report", "zzz", "--store", str(stored)) == 6
    assert f"no run starts with 'zzz'; the store has {run.run_id}" in capsys.readouterr().err


def test_an_error_has_its_exit_code_although_its_message_cannot_be_written(
    repository: Path,
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "services.cli.main", "worker", "--revision", "r"],
            cwd=repository,
            stderr=full,
            check=False,
        )
    assert done.returncode == 2


# What is not installed.


def test_a_verb_whose_packages_are_not_installed_names_them_and_the_others_work(
    repository: Path, stored: Path
) -> None:
    code = f"""
import sys
sys.modules["pynvml"] = None
from services.cli.main import main
for arguments in (["status", "--json", "--store", {str(stored)!r}], ["worker", "--model", "/m"]):
    sys.argv = ["keepwarm", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended", ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("ended")] == [
        "ended 0",
        "ended 2",
    ]
    assert "`keepwarm worker` needs pynvml, which is not installed here" in done.stderr


def test_a_bug_in_our_own_modules_is_not_taken_for_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "services.cli.worker", raising=False)
    monkeypatch.setitem(sys.modules, "services.gpu_worker", None)
    with pytest.raises(ModuleNotFoundError):
        CliRunner().invoke(app, ["worker"], catch_exceptions=False)
