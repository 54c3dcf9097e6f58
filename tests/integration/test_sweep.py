"""`keepwarm sweep`, as a person calls it, with the tests' engine."""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.contracts import load_settings
from services.store import Store, run_status
from tests.conftest import sample_lines
from tests.integration.conftest import Command, wait_until
from tests.integration.runs import CLAIMS, outcomes, wait_for_the_first_of
from tests.safetensors_files import write_safetensors

Start = Callable[..., Command]
Sweep = Callable[..., list[str]]
PROMPT = 'name: {0}\ninstructions: {0}\ntemplate: "{{evidence}} {{claim}} Answer:"\nchat: false\n'
CELLS = 2
ALL = CELLS * 240


@pytest.fixture
def environment(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """No broker and no store named: `sweep` brings its own. The engine keeps a journal."""
    for name in ("BROKER_URL", "BROKER_PASSWORD", "STORE_URL"):
        del environment[f"KEEPWARM_{name}"]
    environment["VLLM_TEST_JOURNAL"] = str(tmp_path / "journal")
    return environment


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def sweep(tmp_path: Path, out: Path) -> Sweep:
    """The arguments of a sweep of the samples with two prompts."""

    def write(**changes: Any) -> list[str]:
        for name in ("first", "second"):
            (tmp_path / f"{name}.yaml").write_text(PROMPT.format(name))
        content = {"claims": CLAIMS, "prompts": ["first.yaml", "second.yaml"]} | changes
        (tmp_path / "study.yaml").write_text(json.dumps(content))
        return ["sweep", str(tmp_path / "study.yaml"), "--out", str(out), "--batch-size", "8"]

    return write


def journal(environment: Mapping[str, str]) -> list[str]:
    """A line for each prompt of a claim that an engine answered."""
    path = Path(environment["VLLM_TEST_JOURNAL"])
    return path.read_text().splitlines() if path.exists() else []


def cells(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "sweep.json").read_text())["cells"]
    return found


def rows(out: Path, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = (out / cell["directory"] / "verdicts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def workers(out: Path, cell: Mapping[str, Any]) -> Sequence[str]:
    report = json.loads((out / cell["directory"] / "report.json").read_text())
    return [worker["worker_id"] for worker in report["workers"]]


def assert_each_cell_has_one_verdict_a_claim(out: Path, count: int = CELLS) -> None:
    found = cells(out)
    assert len(found) == count
    for cell in found:
        assert cell["complete"], cell
        assert [row["claim_id"] for row in rows(out, cell)] == [row["id"] for row in sample_lines()]


def test_a_sweep_answers_every_cell_with_one_worker_and_a_second_one_computes_nothing(
    command: Start, sweep: Sweep, out: Path, environment: dict[str, str]
) -> None:
    arguments = sweep(select=0.5)
    running = command(*arguments)
    assert running.wait() == 0, running.output
    assert_each_cell_has_one_verdict_a_claim(out)
    first, second = cells(out)
    assert workers(out, first) == workers(out, second)
    assert len(workers(out, first)) == 1
    assert len(journal(environment)) == ALL
    assert len(set(journal(environment))) == ALL
    assert running.output.count("Stopping the workers.") == 1
    assert "selected by" in running.output
    before = (out / "sweep.json").read_bytes()
    again = command(*arguments, VLLM_TEST_FAULT="no-start")
    assert again.wait() == 0, again.output
    assert "Every claim has an outcome already." in again.output
    assert (out / "sweep.json").read_bytes() == before
    assert len(journal(environment)) == ALL


def test_a_sweep_that_a_signal_stops_writes_its_results_and_computes_only_the_rest_later(
    command: Start, sweep: Sweep, out: Path, environment: dict[str, str]
) -> None:
    arguments = sweep()
    running = command(*arguments, VLLM_TEST_CLAIM_SECONDS="0.1")
    wait_for_the_first_of(out)
    left = running.descendants()
    running.signal(signal.SIGTERM)
    assert running.wait() == 143, running.output
    assert "Rerun the same command to resume the sweep." in running.output
    wait_until(lambda: not any(process.is_running() for process in left), "all of it gone")
    done = sum(cell["done"] for cell in cells(out))
    assert 0 < done < ALL
    Path(environment["VLLM_TEST_JOURNAL"]).unlink()
    again = command(*arguments)
    assert again.wait() == 0, again.output
    assert_each_cell_has_one_verdict_a_claim(out)
    assert len(journal(environment)) == ALL - done


def test_a_sweep_that_is_killed_in_its_second_cell_computes_only_the_rest_later(
    command: Start, sweep: Sweep, out: Path, environment: dict[str, str]
) -> None:
    arguments = sweep()
    running = command(*arguments, VLLM_TEST_CLAIM_SECONDS="0.02")
    running.said("first: 240 claims, accuracy ")
    left = running.descendants()
    running.signal(signal.SIGKILL)
    running.wait()
    wait_until(lambda: not any(process.is_running() for process in left), "all of it gone")
    done = len(outcomes({"KEEPWARM_STORE_URL": str(out / "keepwarm.sqlite")}))
    assert 240 <= done < ALL
    Path(environment["VLLM_TEST_JOURNAL"]).unlink()
    again = command(*arguments)
    assert again.wait() == 0, again.output
    assert_each_cell_has_one_verdict_a_claim(out)
    assert len(journal(environment)) == ALL - done


def test_a_model_whose_engine_cannot_start_fails_its_cells_and_the_others_go_on(
    command: Start, sweep: Sweep, out: Path, small_model: Path
) -> None:
    broken = {
        "name": "broken",
        "model": str(small_model),
        "engine_arguments": ["--max-model-len=no-number"],
    }
    arguments = sweep(models=[broken, {"model": str(small_model), "name": "good"}])
    running = command(*arguments)
    assert running.wait() == 4, running.output
    by_name = {cell["name"]: cell for cell in cells(out)}
    for prompt in ("first", "second"):
        good, failed = by_name[f"{prompt}, good"], by_name[f"{prompt}, broken"]
        assert good["complete"] and good["error"] is None and len(rows(out, good)) == 240
        assert not failed["complete"] and "no-number" in failed["error"]
        assert f"{prompt}, broken: " in running.output


def test_a_cell_with_an_adapter_is_answered_by_it(
    command: Start, sweep: Sweep, out: Path, small_model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    # The test engine's answers go by the length of the adapter's path.
    adapter = adapter.rename(tmp_path / ("adapter" + "r" * (1 + -len(str(adapter)) % 3)))
    write_safetensors(adapter / "adapter_model.safetensors", {"layers.0.lora_A.weight": (8, 4)})
    base = {"model": str(small_model), "name": "base"}
    arguments = sweep(models=[base, {**base, "name": "adapted", "adapter": adapter.name}])
    running = command(*arguments)
    assert running.wait() == 0, running.output
    assert_each_cell_has_one_verdict_a_claim(out, count=4)
    by_name = {cell["name"]: rows(out, cell) for cell in cells(out)}
    for prompt in ("first", "second"):
        pairs = zip(by_name[f"{prompt}, base"], by_name[f"{prompt}, adapted"], strict=True)
        assert all(a["label"] != b["label"] for a, b in pairs)
    assert running.output.count("Stopping the workers.") == 2


def test_a_cell_whose_labels_the_model_never_answers_is_cancelled_and_the_others_go_on(
    command: Start, sweep: Sweep, out: Path
) -> None:
    arguments = sweep()
    running = command(*arguments, VLLM_TEST_FAULT="thinks", VLLM_TEST_CLAIM_SECONDS="0.02")
    assert running.wait() == 8, running.output
    assert "Warning: first: the labels have" in running.output
    assert "Warning: second: the labels have" in running.output
    with Store.open(load_settings(store_url=str(out / "keepwarm.sqlite"))) as store:
        for cell in cells(out):
            status = run_status(store, cell["run_id"])
            assert status is not None and status.cancelled and status.done >= 64
    again = command(*arguments, "--allow-low-mass")
    assert again.wait() == 0, again.output
    assert_each_cell_has_one_verdict_a_claim(out)
