"""Prompts that reason first, with the tests' engine: each claim is two requests, or none."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.contracts import Claim, ContextSpec, PromptSpec
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import read_prompt
from tests.integration.conftest import Command
from tests.integration.runs import (
    CLAIMS,
    SLOWLY,
    Start,
    assert_complete,
    held,
    hurry,
    outcomes,
    submit,
    wait_for_the_first_verdicts,
)

MOST_TOKENS = 40


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "reasoning.yaml"
    file.write_text(
        "instructions: Judge.\nchat: false\n"
        'template: "Evidence: {evidence}\\nClaim: {claim}\\nReasoning:"\n'
        f"reasoning: {{max_tokens: {MOST_TOKENS}}}\n"
    )
    return file


def rows(command: Start, run_id: str, out: Path) -> list[dict[str, Any]]:
    exporting = command("export", run_id, "--format", "jsonl", "--out", str(out))
    assert exporting.wait() == 0, exporting.output
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def interrupted(worker: Command) -> None:
    worker.signal(signal.SIGTERM)
    worker.said("worker.draining")


def killed(worker: Command) -> None:
    os.killpg(worker.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [interrupted, killed])
def test_a_run_that_loses_its_worker_completes_with_the_reasoning_of_each_verdict(
    end: Callable[[Command], None],
    command: Start,
    environment: dict[str, str],
    prompt: Path,
    tmp_path: Path,
) -> None:
    run_id = submit(command, CLAIMS, "--prompt", str(prompt))
    collecting = command("collect", "--until", run_id)
    worker = command("worker", **SLOWLY)
    wait_for_the_first_verdicts(collecting, environment)
    with held(environment):
        end(worker)
    worker.wait()
    assert 0 < len(outcomes(environment)) < 240
    hurry(environment)
    heir = command("worker", **SLOWLY)
    assert collecting.wait() == 0, heir.output
    assert_complete(environment, run_id)
    found = rows(command, run_id, tmp_path / "out.jsonl")
    assert all(row["reasoning"] and row["reasoning_tokens"] == MOST_TOKENS for row in found)
    reporting = command("report", run_id, "--json")
    assert reporting.wait() == 0
    speed = json.loads(reporting.output[reporting.output.index("{") :])["speed"]
    # What was computed twice counts twice.
    assert speed["reasoning_tokens"] >= 240 * MOST_TOKENS


def test_an_engine_that_crashes_while_it_writes_is_started_again_and_its_claims_answered(
    command: Start, environment: dict[str, str], prompt: Path
) -> None:
    run_id = submit(command, CLAIMS, "--prompt", str(prompt))
    collecting = command("collect", "--until", run_id)
    worker = command("worker", VLLM_TEST_FAULT="crash-once")
    assert collecting.wait() == 0, worker.output
    assert_complete(environment, run_id)
    worker.said("engine.died")


def test_a_claim_whose_second_request_ends_the_engine_is_dead_and_the_others_are_answered(
    command: Start, environment: dict[str, str], prompt: Path, small_model: Path, tmp_path: Path
) -> None:
    """The test engine ends at a prompt of over 200 tokens: only the one with the reasoning is."""
    lines = [{"id": str(number), "claim": f"Claim {number}."} for number in range(16)]
    lines[5]["evidence"] = evidence_of_length(
        read_prompt(prompt), small_model, lines[5]["claim"], 180
    )
    file = tmp_path / "claims.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    collecting = command("collect", "--until", submit(command, file, "--prompt", str(prompt)))
    worker = command("worker", VLLM_TEST_FAULT="crash-long")
    assert collecting.wait() == 0, worker.output
    by_id = {claim_id: (label, reason) for claim_id, label, reason in outcomes(environment)}
    assert by_id.pop("5") == (None, "engine-failed")
    assert len(by_id) == 15 and all(label for label, _ in by_id.values())


def evidence_of_length(spec: PromptSpec, model: Path, claim: str, tokens: int) -> str:
    """Evidence with which the claim's prompt has about so many tokens."""
    compiled = CompiledPrompt(spec, ModelTokenizer.load(ContextSpec(model=str(model))))
    evidence = "a"
    while True:
        asked = Claim(claim_id="c", position=0, text=claim, evidence=evidence)
        length = len(compiled.encode([asked])[0])
        if length >= tokens:
            assert length <= 200 < length + MOST_TOKENS
            return evidence
        evidence += " word"
