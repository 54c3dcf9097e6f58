import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Settings, load_settings
from services.contracts.errors import UsageError
from services.node import walltime
from services.node.walltime import seconds_until_drain

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _a_clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setattr(walltime.time, "time", lambda: NOW)


def test_where_nobody_set_an_end_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_until_drain(load_settings()) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    assert seconds_until_drain(load_settings()) is None


@pytest.mark.parametrize(("grace", "seconds"), [(20, 575), (100, 495)])
def test_the_drain_begins_a_grace_period_and_a_little_before_the_end(
    grace: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(walltime_seconds=600, grace_seconds=grace)
    assert seconds_until_drain(settings) == seconds
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(NOW) + 600))
    assert seconds_until_drain(load_settings(grace_seconds=grace)) == seconds


def test_the_setting_counts_before_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "nonsense")
    assert seconds_until_drain(load_settings(walltime_seconds=100)) == 75


@pytest.mark.parametrize("left", [0, 10, 25, -1_000])
def test_where_there_is_no_time_left_the_drain_begins_at_once(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(NOW) + left))
    assert seconds_until_drain(load_settings()) == 0


@pytest.mark.parametrize("end", ["soon", "2026-10-06T12:00:00", "0x10", "1,5"])
def test_an_end_that_is_no_time_is_reported_with_the_next_step(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    with pytest.raises(UsageError, match="SLURM_JOB_END_TIME is .*KEEPWARM_WALLTIME_SECONDS"):
        seconds_until_drain(load_settings())


@given(
    walltime_seconds=st.floats(min_value=0.001, max_value=604_800),
    grace=st.floats(min_value=0.001, max_value=604_800),
)
def test_a_drain_that_is_not_too_late_already_ends_before_the_walltime_does(
    walltime_seconds: float, grace: float
) -> None:
    settings = Settings(walltime_seconds=walltime_seconds, grace_seconds=grace)
    begins = seconds_until_drain(settings)
    assert begins is not None and begins >= 0
    assert begins == 0 or begins + grace < walltime_seconds
