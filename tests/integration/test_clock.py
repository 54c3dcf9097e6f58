"""The wall clock jumps in the midst of a run: time-outs, rates and durations do not follow it."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.integration.runs import Start, begin, status_of

# The last one of these is for programs with several threads.
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


class WallClock:
    """The clock that faked processes read at every look: ours, and as far ahead as it was set."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(timedelta())

    def set(self, ahead: timedelta) -> None:
        seconds = ahead.total_seconds()
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+.0f}\n")
        fresh.replace(self._file)  # whole, for whoever reads it meanwhile

    @property
    def variables(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARIES[-1]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    if not LIBRARIES:
        pytest.skip("libfaketime is not installed: `apt-get install faketime` does")
    return WallClock(tmp_path / "clock")


def last_day(output: str) -> datetime:
    """When the last event was logged, by the process's own clock."""
    return datetime.fromisoformat(json.loads(output.splitlines()[-1])["timestamp"])


def test_a_wall_clock_that_jumps_a_day_forth_and_back_changes_nothing(
    command: Start, environment: dict[str, str], clock: WallClock
) -> None:
    started = time.monotonic()
    run = begin(command, environment, **clock.variables, TEST_ENGINE_CLAIM_SECONDS="0.04")
    for days in (1, -1):
        clock.set(timedelta(days=days))
        commits = run.collecting.output.count("store.committed")
        run.collecting.said("store.committed", times=commits + 2)
        # The jump is real: it is in the logs.
        ahead = last_day(run.collecting.output) - datetime.now(UTC)
        assert abs(ahead - timedelta(days=days)) < timedelta(hours=1)
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
    print(speed)
