"""`keepwarm run`, `submit`, `collect`, `status`, `report`, `export`: as a person calls them."""

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from services.broker import PrivateNode
from tests.conftest import REPOSITORY, SHARED_DATA, remove_at_once, sample_lines
from tests.integration.conftest import PATIENCE, Command, is_worker, wait_until
from tests.integration.runs import held, hurry, keepers, wait_for_the_first_of, warm_here
from tests.safetensors_files import write_safetensors

Start = Callable[..., Command]
CLAIMS = str(REPOSITORY / "samples" / "claims.jsonl")


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    """No broker and no store named: `run` brings its own."""
    for name in ("BROKER_URL", "BROKER_PASSWORD", "STORE_URL"):
        del environment[f"KEEPWARM_{name}"]
    return environment


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_one_row_a_claim(out: Path) -> None:
    found = rows(out / "verdicts.jsonl")
    expected = sample_lines()
    assert [row["claim_id"] for row in found] == [line["id"] for line in expected]
    assert [row["claim"] for row in found] == [line["claim"] for line in expected]
    assert [row["gold"] for row in found] == [line["label"] for line in expected]
    assert all(row["label"] and row["probabilities"][row["label"]] for row in found)


def strangers(out: Path) -> list[psutil.Process]:
    """Processes that work in the output directory or that a run there started."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("HOME", "")
            if str(out) in home or str(out) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_run_answers_every_claim_and_leaves_results_and_nothing_else(
    command: Start, out: Path
) -> None:
    running = command("run", CLAIMS, "--out", str(out))
    assert running.wait() == 0, running.output
    assert_one_row_a_claim(out)
    report = json.loads((out / "report.json").read_text())
    assert report["status"]["complete"] and report["lines"] == 240
    assert report["quality"]["labelled"] == 240
    assert sum(report["verdicts"].values()) == 240
    assert "accuracy" in running.output and "macro-F1" in running.output
    assert not (out / "rejected.jsonl").exists() and not (out / ".broker").exists()
    assert not strangers(out)


def test_run_on_a_finished_run_only_reports(command: Start, out: Path) -> None:
    assert command("run", CLAIMS, "--out", str(out)).wait() == 0
    before = (out / "verdicts.jsonl").read_bytes()
    again = command("run", CLAIMS, "--out", str(out), VLLM_TEST_FAULT="no-start")
    assert again.wait() == 0, again.output
    assert "Every claim has an outcome already" in again.output
    assert (out / "verdicts.jsonl").read_bytes() == before


def test_bad_lines_are_rejected_with_reasons_and_the_good_ones_go_on(
    command: Start, out: Path
) -> None:
    bad = str(REPOSITORY / "samples" / "bad_lines.jsonl")
    running = command("run", bad, "--out", str(out))
    assert running.wait() == 0, running.output
    assert len(rows(out / "verdicts.jsonl")) == 5
    rejected = rows(out / "rejected.jsonl")
    assert [row["line"] for row in rejected] == [2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 15, 17]
    assert all(row["reason"] and row["next_step"] for row in rejected)
    report = json.loads((out / "report.json").read_text())
    assert report["lines"] == 18 and report["status"]["repeated"] == 1
    assert report["input"]["unknown_labels"] == {"MAYBE": 1}
    assert f"Rejected lines: {out}/rejected.jsonl" in running.output


def test_a_run_whose_labels_the_model_never_answers_stops_and_resumes_with_allow_low_mass(
    command: Start, out: Path
) -> None:
    arguments = ("run", CLAIMS, "--out", str(out), "--batch-size", "16")
    slow_thinker = {"VLLM_TEST_FAULT": "thinks", "VLLM_TEST_CLAIM_SECONDS": "0.03"}
    running = command(*arguments, **slow_thinker)
    assert running.wait() == 8, running.output
    assert "Warning: the labels have 0.21 % of the probability" in running.output
    assert "the model answers '<think>'" in running.output
    assert "rerun the command with --allow-low-mass" in running.output
    answered = len(rows(out / "verdicts.jsonl"))
    assert 64 <= answered < 240
    report = json.loads((out / "report.json").read_text())
    assert report["mean_mass"] == pytest.approx(0.002, rel=0.2)
    assert report["status"]["low_mass"]["says"] == "<think>"
    told = command("status", "--store", str(out / "keepwarm.sqlite"))
    assert told.wait() == 0 and "the labels have 0.21 % of" in told.output
    assert not strangers(out)
    again = command(*arguments, "--allow-low-mass", VLLM_TEST_FAULT="thinks")
    assert again.wait() == 0, again.output
    assert len(rows(out / "verdicts.jsonl")) == 240


@pytest.mark.parametrize("limit", ["8", "64"])
def test_a_run_of_one_batch_whose_labels_the_model_never_answers_fails(
    limit: str, command: Start, out: Path
) -> None:
    running = command("run", CLAIMS, "--limit", limit, "--out", str(out), VLLM_TEST_FAULT="thinks")
    assert running.wait() == 8, running.output
    assert "Warning: the labels have 0.21 % of the probability" in running.output
    assert "To accept these results" in running.output
    assert "The run was stopped" not in running.output
    assert len(rows(out / "verdicts.jsonl")) == int(limit)


def test_a_run_with_an_adapter_is_answered_by_it(command: Start, out: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    # The test engine's answers go by the length of the adapter's path.
    adapter = adapter.rename(tmp_path / ("adapter" + "r" * (1 + -len(str(adapter)) % 3)))
    lora = {"layers.0.lora_A.weight": (8, 4)}
    write_safetensors(adapter / "adapter_model.safetensors", lora)
    for name, flags in (("base", ()), ("adapted", ("--adapter", str(adapter)))):
        running = command("run", CLAIMS, "--limit", "20", "--out", str(out / name), *flags)
        assert running.wait() == 0, running.output
    base, adapted = (rows(out / name / "verdicts.jsonl") for name in ("base", "adapted"))
    assert len(base) == len(adapted) == 20
    assert all(a["label"] != b["label"] for a, b in zip(base, adapted, strict=True))
    context = json.loads((out / "adapted" / "report.json").read_text())["run"]["context"]
    assert context["adapter"] == str(adapter) and context["adapter_revision"].startswith("files-")
    assert "\nadapter " in running.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_that_the_same_command_completes(
    command: Start, out: Path, number: int
) -> None:
    arguments = ("run", CLAIMS, "--out", str(out), "--batch-size", "8")
    running = command(*arguments, VLLM_TEST_CLAIM_SECONDS="0.1")
    running.said("/s, ")  # without a terminal, every five seconds
    left = running.descendants()
    running.signal(number)
    assert running.wait() == 128 + number, running.output
    assert "Rerun the same command" in running.output
    wait_until(lambda: not any(process.is_running() for process in left), "all of it gone")
    assert not strangers(out)
    again = command(*arguments)
    assert again.wait() == 0, again.output
    assert_one_row_a_claim(out)


def test_a_run_that_loses_its_terminal_writes_its_results(
    environment: dict[str, str], out: Path
) -> None:
    arguments = ("run", CLAIMS, "--out", str(out), "--batch-size", "8")
    ours, its = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "services.cli.main", *arguments],
        env={**environment, "VLLM_TEST_CLAIM_SECONDS": "0.1", "TERM": "xterm"},
        cwd=REPOSITORY,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        # The terminal of its session, as in a shell of sshd's.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    shown = threading.Thread(target=read_all, args=(ours,))
    shown.start()
    wait_for_the_first_of(out)
    left = psutil.Process(running.pid).children(recursive=True)
    os.close(ours)
    assert running.wait(PATIENCE) == 128 + signal.SIGHUP
    shown.join(PATIENCE)
    assert 0 < len(rows(out / "verdicts.jsonl")) < 240
    assert not json.loads((out / "report.json").read_text())["status"]["complete"]
    wait_until(lambda: not any(process.is_running() for process in left), "all of it gone")
    assert not strangers(out)


def read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


def test_a_run_whose_runtime_directory_is_removed_completes_and_leaves_nothing(
    command: Start, out: Path, environment: dict[str, str]
) -> None:
    running = command(
        *("run", CLAIMS, "--out", str(out), "--batch-size", "8"), VLLM_TEST_CLAIM_SECONDS="0.1"
    )
    wait_for_the_first_of(out)
    left = running.descendants()
    remove_at_once(Path(environment["KEEPWARM_RUNTIME_DIR"]))
    hurry(environment)
    assert running.wait() == 0, running.output
    assert_one_row_a_claim(out)
    wait_until(lambda: not any(process.is_running() for process in left), "all of it gone")
    assert not strangers(out)
    assert not keepers(environment)


def test_sigkill_leaves_no_process_behind_and_the_same_command_completes(
    command: Start, out: Path
) -> None:
    arguments = ("run", CLAIMS, "--out", str(out), "--batch-size", "8")
    running = command(*arguments, VLLM_TEST_CLAIM_SECONDS="0.1")
    wait_for_the_first_of(out)
    left = running.descendants()
    assert len(left) > 4
    os.kill(running.process.pid, signal.SIGKILL)
    running.wait()
    wait_until(lambda: not any(process.is_running() for process in left), "all of it gone")
    again = command(*arguments)
    assert again.wait() == 0, again.output
    assert_one_row_a_claim(out)


def test_a_worker_that_is_killed_is_replaced(
    command: Start, out: Path, environment: dict[str, str]
) -> None:
    running = command(
        "run", CLAIMS, "--out", str(out), "--batch-size", "8", VLLM_TEST_CLAIM_SECONDS="0.1"
    )
    wait_for_the_first_of(out)
    running.descendant(is_worker).kill()
    hurry(environment)
    assert running.wait() == 0, running.output
    assert_one_row_a_claim(out)
    report = json.loads((out / "report.json").read_text())
    assert len(report["workers"]) == 2


def test_progress_moves_while_a_batch_is_answered(command: Start, out: Path) -> None:
    """All claims are one batch: the store has none of them before all are answered."""
    running = command(
        *("run", CLAIMS, "--out", str(out), "--batch-size", "256"),
        VLLM_TEST_CLAIM_SECONDS="0.08",
    )
    assert running.wait() == 0, running.output
    counts = [int(count) for count in re.findall(r"(\d+) of 240 claims", running.output)]
    between = {count for count in counts if 0 < count < 240}
    assert len(between) >= 3 and counts == sorted(counts), running.output


def test_a_run_shows_that_its_model_loads_and_that_its_engine_is_restarted(
    command: Start, out: Path, environment: dict[str, str]
) -> None:
    running = command(
        *("run", CLAIMS, "--out", str(out), "--batch-size", "8"),
        VLLM_TEST_CLAIM_SECONDS="0.1",
        VLLM_TEST_START_SECONDS="8",
    )
    running.said("0 of 240 claims: loading the model, ")
    wait_for_the_first_of(out)
    (engine,) = warm_here(environment)
    psutil.Process(engine.pid).kill()
    # The kernel counts a lack of memory for the whole machine, so another test may be named for it.
    running.said("restarting it, ")
    hurry(environment)
    assert running.wait() == 0, running.output
    assert_one_row_a_claim(out)


def test_a_run_shows_that_the_broker_has_an_alarm(
    command: Start, out: Path, environment: dict[str, str], node: PrivateNode, broker
) -> None:
    running = command(
        *("run", CLAIMS, "--out", str(out), "--batch-size", "8"),
        KEEPWARM_BROKER_URL=node.url,
        KEEPWARM_BROKER_PASSWORD=node.password,
        VLLM_TEST_CLAIM_SECONDS="0.1",
    )
    wait_for_the_first_of(out)
    with held(environment):
        node.control("set_vm_memory_high_watermark", "absolute", "1000000")
    hurry(environment)
    try:
        running.said(": waiting: the broker blocks publishing: low on memory")
    finally:
        node.control("set_vm_memory_high_watermark", "0.4")
    assert running.wait() == 0, running.output
    assert_one_row_a_claim(out)


def test_two_workers_share_a_run(command: Start, out: Path) -> None:
    running = command(
        *("run", CLAIMS, "--out", str(out), "--batch-size", "4", "--workers", "2"),
        VLLM_TEST_CLAIM_SECONDS="0.1",
    )
    assert running.wait() == 0, running.output
    assert_one_row_a_claim(out)
    report = json.loads((out / "report.json").read_text())
    assert len(report["workers"]) == 2


def test_an_engine_that_cannot_start_ends_the_run_with_its_last_words(
    command: Start, out: Path
) -> None:
    running = command("run", CLAIMS, "--out", str(out), VLLM_TEST_FAULT="no-start")
    assert running.wait() == 4
    assert "RuntimeError: out of memory, says the test engine" in running.output
    assert not strangers(out)


def test_a_second_run_in_the_same_directory_is_refused(command: Start, out: Path) -> None:
    running = command("run", CLAIMS, "--out", str(out), VLLM_TEST_START_SECONDS="600")
    running.said("0 of 240 claims")
    second = command("run", CLAIMS, "--out", str(out))
    assert second.wait() == 6
    assert "another `keepwarm run` is using" in second.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["/no/such/file.jsonl"], 3, "does not exist"),
        ([str(REPOSITORY), "--limit", "1"], 3, "is a directory"),
        ([CLAIMS, "--model", "/no/such/model"], 4, "there is no model at /no/such/model"),
        ([CLAIMS, "--prompt", "/no/such/prompt.yaml"], 3, "prompt file /no/such/prompt.yaml"),
        ([CLAIMS, "--broker", "amqp://me:secret@host/"], 2, "read passwords in arguments"),
        ([CLAIMS, "--broker", "http://host/"], 2, "URL is unusable"),
        ([CLAIMS, "--broker", "amqp://keepwarm@127.0.0.1:9/"], 5, "127.0.0.1:9"),
        ([CLAIMS, "--store", "mysql://host/db"], 2, "SQLite or PostgreSQL"),
        ([CLAIMS, "--seed", "1"], 2, "--limit"),
        ([CLAIMS, "--batch-size", "100000"], 2, "KEEPWARM_BATCH_SIZE"),
        ([CLAIMS, "--out", "/proc/no/such"], 6, "--out"),
    ],
)
def test_bad_flags_and_files_are_named_with_the_next_step(
    command: Start, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    running = command("run", *arguments, KEEPWARM_BROKER_CONNECT_TIMEOUT_SECONDS="1")
    assert running.wait() == code, running.output
    flat = " ".join(running.output.replace("│", " ").split())
    assert says in flat
    assert (
        "Traceback" not in running.output
        and "secret" not in running.output.replace("secret@host", "")
    ) or code == 2


def test_label_words_with_a_common_first_token_are_refused_before_anything_starts(
    command: Start, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("labels: [{name: A, word: 'Zq1'}, {name: B, word: 'Zq2'}]")
    running = command("run", CLAIMS, "--prompt", str(prompt), "--out", str(tmp_path / "out"))
    assert running.wait() == 4
    assert "same token" in running.output and "'Zq1'" in running.output
    assert not (tmp_path / "out").exists()


def test_standard_input_is_a_file_too(environment: dict[str, str], out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "run", "-", "--out", str(out)],
        input=Path(CLAIMS).read_bytes(),
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_one_row_a_claim(out)


def test_csv_columns_are_named_on_the_command_line(
    command: Start, out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "claims.csv"
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "proof", "truth", "comment"])
        for line in sample_lines()[:10]:
            writer.writerow([line["claim"], line["evidence"], line["label"].lower(), "x"])
    named = ["--column", "claim=text", "--column", "evidence=proof", "--column", "label=truth"]
    running = command("run", str(file), *named, "--out", str(out))
    assert running.wait() == 0, running.output
    assert "claims.csv: claims (CSV), 10 records: 10 claims, 0 repeated" in running.output
    assert "evidence: all claims" in running.output
    found = rows(out / "verdicts.jsonl")
    assert [row["claim"] for row in found] == [line["claim"] for line in sample_lines()[:10]]
    assert [row["gold"] for row in found] == [line["label"] for line in sample_lines()[:10]]


def test_status_report_and_export_tell_of_a_run(command: Start, out: Path, tmp_path: Path) -> None:
    assert command("run", CLAIMS, "--out", str(out)).wait() == 0
    store = ("--store", str(out / "keepwarm.sqlite"))
    status = command("status", "--json", *store)
    assert status.wait() == 0
    (run,) = json.loads(status.output)
    assert (run["total"], run["done"], run["dead"], run["complete"]) == (240, 240, 0, True)
    assert run["workers_seen"] == 1
    table = command("status", *store)
    assert table.wait() == 0 and run["run_id"] in table.output
    report = command("report", run["run_id"][:10], "--json", *store)
    assert report.wait() == 0
    assert json.loads(report.output) == json.loads((out / "report.json").read_text())
    for format, read in {
        "jsonl": rows,
        "fever": rows,
        "csv": lambda path: list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())),
        "parquet": lambda path: pq.read_table(path).to_pylist(),
    }.items():
        path = tmp_path / f"export.{format}"
        export = command("export", run["run_id"], "--format", format, "-o", str(path), *store)
        assert export.wait() == 0, export.output
        found = read(path)
        assert len(found) == 240
        ids = [row.get("claim_id") or row.get("id") for row in found]
        assert ids == [line["id"] for line in sample_lines()]
    labels = {row["predicted_label"] for row in rows(tmp_path / "export.fever")}
    assert labels <= {"SUPPORTS", "REFUTES", "NOT ENOUGH INFO"}
    unknown = command("report", "run-nope", *store)
    assert unknown.wait() == 6 and run["run_id"] in unknown.output


def test_submitting_twice_completes_and_doubles_nothing(
    command: Start, node: PrivateNode, broker, tmp_path: Path
) -> None:
    shared = {
        "KEEPWARM_BROKER_URL": node.url,
        "KEEPWARM_BROKER_PASSWORD": node.password,
    }
    stored = {**shared, "KEEPWARM_STORE_URL": str(tmp_path / "store.sqlite")}
    first = command("submit", CLAIMS, **shared)
    assert first.wait() == 0, first.output
    second = command("submit", CLAIMS, **shared)
    assert second.wait() == 0
    run_id = first.lines[-1]
    assert second.lines[-1] == run_id
    command("worker", **shared)
    collecting = command("collect", **stored)

    def counted() -> dict:
        status = command("status", "--json", **stored)
        if status.wait() != 0:
            return {}
        runs = json.loads(status.lines[-1])
        return runs[0] if runs and runs[0]["duplicates"] == 240 else {}

    run = wait_until(counted, "every claim counted once and every duplicate ignored")
    assert (run["total"], run["done"], run["complete"]) == (240, 240, True)
    # With the store at hand nothing is sent again.
    third = command("submit", CLAIMS, **stored)
    assert third.wait() == 0 and third.lines[-1] == run_id
    collecting.signal(signal.SIGTERM)
    assert collecting.wait() == 0
    assert counted()["done"] == 240


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the FEVER claims are not at hand")
def test_all_of_fever_dev_ends_with_one_verdict_a_claim(command: Start, out: Path) -> None:
    file = SHARED_DATA / "fever_labelled_dev.jsonl"
    running = command("run", str(file), "--out", str(out))
    assert running.wait(480) == 0, running.output
    expected = rows(file)
    found = rows(out / "verdicts.jsonl")
    assert [row["claim_id"] for row in found] == [str(row["id"]) for row in expected]
    assert [row["gold"] for row in found] == [row["label"] for row in expected]
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["labelled"] == 19_998
