import threading

from services.telemetry import BoundedLabels, TimedLock, Watchdog
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


def test_a_lock_tells_how_long_its_holder_has_had_it_and_not_how_long_others_waited(
    clock: Clock,
) -> None:
    lock = TimedLock(clock)
    assert lock.held_seconds == 0
    with lock:
        clock.now += 3
        waiting = threading.Thread(target=lock.__enter__)
        waiting.start()
        assert lock.held_seconds == 3
    waiting.join()
    assert lock.held_seconds == 0
    clock.now += 2
    assert lock.held_seconds == 2
    lock.__exit__()
    assert lock.held_seconds == 0
