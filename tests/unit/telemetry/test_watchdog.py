from services.telemetry import BoundedLabels, Watchdog
from services.telemetry.watchdog import STALLED_SECONDS
from tests.unit.clock import Clock


def test_a_loop_that_moved_lately_is_not_stuck(clock: Clock) -> None:
    pulse = Watchdog(clock)
    clock.now += STALLED_SECONDS
    assert pulse.liveness_error is None
    clock.now += 1
    assert pulse.liveness_error == "the main loop has stalled for 121 s"
    pulse.beat()
    assert pulse.liveness_error is None


def test_the_first_values_are_themselves_and_all_others_are_one() -> None:
    few = BoundedLabels(2)
    assert [few(value) for value in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]
