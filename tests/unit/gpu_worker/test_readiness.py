"""What a node can have, and how soon."""

from pathlib import Path

import pytest

from services.contexts import Device
from services.contracts import load_settings
from services.contracts.errors import EngineStartError, KeeperError, ModelError
from services.gpu_worker.readiness import Readiness
from tests.unit.clock import Clock

DEVICE = Device("cpu", "Xeon", 2**34, (0,))


@pytest.fixture
def readiness(tmp_path: Path, clock: Clock) -> Readiness:
    settings = load_settings(runtime_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    return Readiness(DEVICE, settings, clock)


# What failed here.


def test_a_context_that_failed_is_left_alone_for_a_while_and_then_comes_back(
    readiness: Readiness, clock: Clock
) -> None:
    pause = readiness.failed("ctx-a", EngineStartError("it was evicted"))
    assert 0 < pause <= 10
    assert not readiness.may_try("ctx-a") and readiness.may_try("ctx-b")
    clock.now += pause
    assert readiness.may_try("ctx-a")


def test_each_failure_in_a_row_makes_the_pause_longer_to_a_bound(readiness: Readiness) -> None:
    pauses = [readiness.failed("ctx-a", ModelError("no such model")) for _ in range(12)]
    assert all(10 <= later * 2**-number <= 20 for number, later in enumerate(pauses[1:5]))
    assert all(900 <= pause <= 1800 for pause in pauses[9:])


def test_what_failed_is_forgotten_once_the_context_answers(readiness: Readiness) -> None:
    for _ in range(8):
        readiness.failed("ctx-a", EngineStartError("no room"))
    readiness.answered("ctx-a")
    assert readiness.failed("ctx-a", EngineStartError("no room")) <= 10


def test_a_keeper_that_cannot_be_used_keeps_no_context_away_for_long(readiness: Readiness) -> None:
    assert all(readiness.failed("ctx-a", KeeperError("it restarts")) <= 10 for _ in range(12))
