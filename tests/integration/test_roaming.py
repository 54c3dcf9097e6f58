"""Workers without a context of their own: they serve what is wanted, and change when that pays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import Command, wait_until
from tests.integration.runs import CLAIMS, end_well, status_of, submit, warm_here

Start = Callable[..., Command]


@pytest.fixture
def roaming(environment: dict[str, str]) -> dict[str, str]:
    """What takes the model from a worker's environment."""
    return {"KEEPWARM_MODEL": ""}


@pytest.fixture
def other_model(small_model: Path, tmp_path: Path) -> Path:
    other = tmp_path / "other-model"
    shutil.copytree(small_model, other)
    (other / "config.json").write_text('{"model_type": "other"}')
    return other


def events(command: Command, name: str) -> list[dict]:
    return [json.loads(line) for line in command.lines if f'"event": "{name}"' in line]


def test_a_worker_without_a_model_serves_one_run_after_the_other_whatever_they_want(
    command: Start,
    environment: dict[str, str],
    roaming: dict[str, str],
    other_model: Path,
) -> None:
    worker = command("worker", **roaming)
    worker.said("worker.idle")
    collecting = command("collect")
    first = submit(command)
    second = submit(command, CLAIMS, "--model", str(other_model))

    def both_are_complete() -> bool:
        found = [status_of(environment, run_id) for run_id in (first, second)]
        return all(status is not None and status.complete for status in found)

    wait_until(both_are_complete, "both runs complete")
    contexts = {event["to"] for event in events(worker, "context.switching")}
    assert len(contexts) == 2
    # Both stay warm: a third run on either finds its engine.
    records = warm_here(environment)
    assert {record.context.context_id for record in records} == contexts
    end_well(worker, collecting)


def test_a_context_that_cannot_be_had_here_is_left_to_other_nodes_until_it_can(
    command: Start, environment: dict[str, str], roaming: dict[str, str], other_model: Path
) -> None:
    away = submit(command, CLAIMS, "--model", str(other_model))
    elsewhere = other_model.rename(other_model.with_name("elsewhere"))  # not where it should be
    here = submit(command)
    collecting = command("collect")
    soon = {"TEST_WAITS": "services.gpu_worker.scheduling._FIRST_PAUSE_SECONDS=2"}
    worker = command("worker", **roaming, **soon)
    wait_until(
        lambda: (status := status_of(environment, here)) is not None and status.complete,
        "the run that can be answered here",
    )
    worker.said("context.unusable")
    status = status_of(environment, away)
    assert status is not None and (status.done, status.dead, status.complete) == (0, 0, False)
    elsewhere.rename(other_model)
    wait_until(
        lambda: (status := status_of(environment, away)) is not None and status.complete,
        "the other run as well",
    )
    end_well(worker, collecting)


def test_an_idle_worker_uses_what_is_warm_here(command: Start, roaming: dict[str, str]) -> None:
    warming = command("contexts", "warm")
    assert warming.wait() == 0, warming.output
    wanted = submit(command)
    collecting = command("collect", "--until", wanted)
    worker = command("worker", **roaming)
    assert collecting.wait() == 0, collecting.output
    assert events(worker, "engine.ready")[0]["warm"] is True
    assert len(events(worker, "context.switching")) == 1
    end_well(worker)


def test_flags_of_a_model_without_a_model_are_refused(command: Start) -> None:
    worker = command("worker", "--revision", "main", KEEPWARM_MODEL="")
    assert worker.wait() == 2
    assert "name it with --model" in worker.output
