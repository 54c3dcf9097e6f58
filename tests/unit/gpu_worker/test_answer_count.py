import pytest
import structlog

from services.gpu_worker import answer_count
from services.gpu_worker.answer_count import AnswerCount
from tests.unit.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(answer_count.time, "monotonic", clock)
    return clock


def logged(count: AnswerCount) -> list[int]:
    with structlog.testing.capture_logs() as events:
        count.log()
    return [event["answered"] for event in events]


def test_a_count_is_logged_when_it_changed_and_not_too_often(clock: Clock) -> None:
    count = AnswerCount(logged=True)
    assert logged(count) == []
    count.add()
    assert logged(count) == [1]
    count.add()
    assert logged(count) == []
    clock.now += 0.2
    assert logged(count) == [2]
    clock.now += 0.2
    assert logged(count) == []


def test_nothing_is_logged_unless_it_is_asked_for(clock: Clock) -> None:
    count = AnswerCount()
    count.add()
    clock.now += 1
    assert logged(count) == [] and count.answered == 1
