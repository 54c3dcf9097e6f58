"""An engine that does not answer is given time, and then up."""

from services.contexts.managed_engine import HangDetector
from tests.unit.clock import Clock


class Asked:
    def __init__(self) -> None:
        self.answers = True
        self.times = 0

    def __call__(self) -> bool:
        self.times += 1
        return self.answers


def seconds_until_it_lasts(hang_detector: HangDetector, clock: Clock) -> float:
    begun = clock.now
    while not hang_detector.is_hung:
        clock.now += 0.1
        assert clock.now < begun + 1_000
    return clock.now - begun


def test_it_is_asked_now_and_then_and_silence_counts_after_several_times(clock: Clock) -> None:
    engine = Asked()
    hang_detector = HangDetector(engine, clock)
    assert not hang_detector.is_hung and engine.times == 0
    engine.answers = False
    assert 60 <= seconds_until_it_lasts(hang_detector, clock) <= 150
    assert 4 <= engine.times <= 10


def test_one_answer_is_enough_to_begin_anew(clock: Clock) -> None:
    engine = Asked()
    hang_detector = HangDetector(engine, clock)
    for number in range(100):
        engine.answers = number % 4 == 0
        clock.now += 20
        assert not hang_detector.is_hung


def test_what_was_before_it_was_used_does_not_count(clock: Clock) -> None:
    engine = Asked()
    engine.answers = False
    hang_detector = HangDetector(engine, clock)
    seconds_until_it_lasts(hang_detector, clock)
    hang_detector.reset()
    assert not hang_detector.is_hung
    assert seconds_until_it_lasts(hang_detector, clock) >= 60
