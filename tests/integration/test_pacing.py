"""Workers of different speeds: each takes what it can finish, and nothing is lost on the way."""

import json
from collections import Counter
from pathlib import Path

import pytest

from services.contracts import load_settings
from services.store import Store, build_report, find_run
from tests.integration.conftest import Command
from tests.integration.runs import (
    Start,
    assert_complete,
    end_well,
    status_of,
    submit,
    write_claims,
)

CLAIMS = 600


def worker_id(worker: Command) -> str:
    worker.said("worker.taking")
    line = next(line for line in worker.lines if '"worker.taking"' in line)
    return str(json.loads(line)["worker"])


def verdicts_by_worker(environment: dict[str, str], run_id: str) -> Counter[str]:
    store = Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"]))
    try:
        report = build_report(store, find_run(store, run_id))
        return Counter({worker.worker_id: worker.verdicts for worker in report.workers})
    finally:
        store.close()


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    lines = [{"id": str(number), "claim": f"Claim {number}."} for number in range(CLAIMS)]
    return write_claims(tmp_path / "claims.jsonl", lines)


def test_a_worker_that_is_four_times_slower_does_its_share_and_does_not_hold_the_last_claims(
    command: Start, environment: dict[str, str], claims: Path
) -> None:
    paced = {"KEEPWARM_PREFETCH_SECONDS": "1"}
    slow = command("worker", VLLM_TEST_CLAIM_SECONDS="0.12", **paced)
    fast = command("worker", VLLM_TEST_CLAIM_SECONDS="0.03", **paced)
    names = worker_id(slow), worker_id(fast)
    # Six batches: three of them are what the slow one would hold, 36 s of its work.
    run_id = submit(command, claims, "--batch-size", "100")
    collecting = command("collect", "--until", run_id)
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id, [str(number) for number in range(CLAIMS)])

    by_slow, by_fast = (verdicts_by_worker(environment, run_id)[name] for name in names)
    assert by_slow + by_fast == CLAIMS
    # A fifth of the whole rate; with what it learned on, and a horizon at the end, not a third.
    assert 0.1 * CLAIMS < by_slow < 0.3 * CLAIMS
    status = status_of(environment, run_id)
    assert status is not None
    # To give back is no loss and no failure.
    assert (status.lost_work, status.duplicates, status.dead) == (0, 0, 0)
    assert status.returned > 0
    assert "batch.failed" not in slow.output + fast.output
    end_well(slow, fast)


def test_a_worker_that_is_killed_after_it_gave_a_rest_back_loses_and_doubles_nothing(
    command: Start, environment: dict[str, str], claims: Path
) -> None:
    run_id = submit(command, claims, "--batch-size", "400")
    collecting = command("collect", "--until", run_id)
    collecting.said("broker.connected")
    doomed = command("worker", VLLM_TEST_CLAIM_SECONDS="0.5")
    collecting.said("claims.returned")  # while 64 claims of that batch are at the engine still
    doomed.process.kill()
    heir = command("worker")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id, [str(number) for number in range(CLAIMS)])
    end_well(heir)
