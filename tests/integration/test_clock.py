"""The wall clock jumps in the midst of a run: time-outs, rates and durations do not follow it."""

import json
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.conftest import Command, wait_until
from tests.integration.runs import CLAIMS, Start, go_on, status_of, submit


class WallClock:
    """The clock that processes with these `variables` see: the system's, and so far ahead."""

    def __init__(self, directory: Path) -> None:
        """Raises CalledProcessError when it cannot be compiled."""
        library = directory / "wall_clock.so"
        source = REPOSITORY / "tests" / "doubles" / "wall_clock.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        self._file = directory / "clock"
        self.set(timedelta())
        self.variables = {"LD_PRELOAD": str(library), "TEST_CLOCK_FILE": str(self._file)}

    def set(self, ahead: timedelta) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{ahead.total_seconds():.0f}")
        fresh.replace(self._file)  # whole, for whoever reads it meanwhile


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler: `apt-get install gcc libc6-dev` brings one")
    return WallClock(tmp_path)


def is_ahead(service: Command, by: timedelta) -> bool:
    """Whether the last event was logged so far ahead, by the process's own clock."""
    told = datetime.fromisoformat(json.loads(service.lines[-1])["timestamp"])
    return abs(told - datetime.now(UTC) - by) < timedelta(hours=1)


def test_a_wall_clock_that_jumps_a_day_forth_and_back_changes_nothing(
    command: Start, environment: dict[str, str], clock: WallClock
) -> None:
    started = time.monotonic()
    # Small batches and transactions: there are many commits to see it at.
    run_id = submit(command, CLAIMS, "--batch-size", "4")
    small = {"KEEPWARM_STORE_COMMIT_VERDICTS": "2", "VLLM_TEST_CLAIM_SECONDS": "0.1"}
    run = go_on(command, environment, run_id, **clock.variables, **small)
    for days in (1, -1):
        ahead = timedelta(days=days)
        clock.set(ahead)
        wait_until(lambda ahead=ahead: is_ahead(run.collecting, ahead), "the jump in its log")
        commits = run.collecting.output.count("store.committed")
        run.collecting.said("store.committed", times=commits + 2)
    clock.set(timedelta())
    run.completes()
    took = time.monotonic() - started
    for service in run.services:
        assert "broker.waiting" not in service.output and "engine.silent" not in service.output
    status = status_of(environment, run.run_id)
    assert status is not None and status.duplicates == 0
    # 240 claims took at least as long as the engine was busy, and no longer than the test did.
    assert 240 / took <= status.claims_per_second < 240
    reporting = command("report", run.run_id, "--json")
    assert reporting.wait() == 0, reporting.output
    speed = json.loads(reporting.output)["speed"]
    assert speed["wall_seconds"] <= took
    assert speed["claims_per_second"] > 0
    assert sum(worker["engine_seconds"] for worker in json.loads(reporting.output)["workers"]) < (
        3 * took  # three batches at a time
    )
