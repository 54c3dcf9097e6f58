"""A worker's measured speed, with a clock that the tests move, and the limits from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_worker.concurrency import AdaptiveConcurrency
from tests.unit.clock import Clock


@pytest.fixture
def concurrency(clock: Clock) -> AdaptiveConcurrency:
    return AdaptiveConcurrency(4.0, 3, clock)


def answer(concurrency: AdaptiveConcurrency, clock: Clock, claims: int, seconds: float) -> None:
    begun = concurrency.begin()
    clock.now += seconds
    concurrency.end(begun, claims)


# The rate.


def test_the_rate_is_unknown_until_a_batch_is_answered(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    assert concurrency.rate is None
    begun = concurrency.begin()
    clock.now += 5
    assert concurrency.rate is None
    concurrency.end(begun, 50)
    assert concurrency.rate == pytest.approx(10)


def test_time_without_work_is_not_slowness(concurrency: AdaptiveConcurrency, clock: Clock) -> None:
    for _ in range(5):
        answer(concurrency, clock, 20, 2)
        clock.now += 3_600
    assert concurrency.rate == pytest.approx(10)


def test_batches_that_share_the_engine_evenly_are_measured_by_what_they_do_together(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    begun = [concurrency.begin() for _ in range(3)]
    clock.now += 9.6  # 48 claims in 9.6 s, and all of them come at the end
    rates = []
    for one in begun:
        concurrency.end(one, 16)
        rates.append(concurrency.rate)
    assert rates == [pytest.approx(5)] * 3


def test_batches_that_are_answered_one_after_the_other_are_measured_by_their_order(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    waiting = [concurrency.begin() for _ in range(3)]
    for _ in range(60):
        clock.now += 2
        concurrency.end(waiting.pop(0), 20)
        waiting.append(concurrency.begin())
    assert concurrency.rate == pytest.approx(10, rel=0.01)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.01, 10)), min_size=1, max_size=60),
    st.floats(0.5, 5_000),
)
def test_whatever_is_at_the_engine_together_a_steady_one_is_measured_right(
    steps: list[tuple[int, float]], rate: float
) -> None:
    """An engine that divides itself evenly among what is there."""
    clock = Clock()
    concurrency = AdaptiveConcurrency(4.0, 3, clock)
    here: list[list[float]] = []  # when begun, and claims done
    for index, seconds in steps:
        if index < len(here):
            begun, done = here.pop(index)
            # Whole claims: what is lost in rounding is known.
            if done >= 1_000:
                concurrency.end(begun, round(done))
                assert concurrency.rate == pytest.approx(rate, rel=0.001)
            else:
                concurrency.end(begun, 0)
        else:
            here.append([concurrency.begin(), 0.0])
        clock.now += seconds
        for one in here:
            one[1] += rate * seconds / len(here)


def test_the_rate_follows_an_engine_that_changes_its_speed(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    for _ in range(50):
        answer(concurrency, clock, 100, 1)
    for _ in range(50):
        answer(concurrency, clock, 10, 1)
    assert 10 <= concurrency.rate < 35  # type: ignore[operator]
    for _ in range(100):
        answer(concurrency, clock, 10, 1)
    assert concurrency.rate == pytest.approx(10, rel=0.1)


def test_one_odd_batch_does_not_turn_the_rate(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    for _ in range(60):
        answer(concurrency, clock, 100, 1)
    answer(concurrency, clock, 1, 1)
    assert concurrency.rate > 90  # type: ignore[operator]


def test_a_batch_that_the_engine_failed_with_is_no_measure(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 0, 120)
    assert concurrency.rate is None
    answer(concurrency, clock, 20, 2)
    answer(concurrency, clock, 0, 120)
    assert concurrency.rate == pytest.approx(10)


def test_an_answer_in_no_time_at_all_is_no_measure(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 20, 0)
    assert concurrency.rate is None


# The limits.


def test_the_claim_limit_is_what_the_worker_finishes_in_the_prefetch_time(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 100, 2)
    assert concurrency.claim_limit == 200


def test_after_another_workers_claims_are_out_of_the_engine_the_first_batch_of_ours_counts(
    clock: Clock,
) -> None:
    concurrency = AdaptiveConcurrency(4.0, 8, clock)
    first, second = concurrency.begin(), concurrency.begin()
    clock.now += 5.4  # of these 4.5 for who was there before
    concurrency.end(first, 32)
    clock.now += 0.9
    concurrency.end(second, 32)
    assert concurrency.claim_limit < 4 * 64 / 6
    answer(concurrency, clock, 32, 0.8)
    assert concurrency.claim_limit == 160
    assert concurrency.rate < 20  # type: ignore[operator]


def test_what_an_engine_answers_at_once_was_not_computed_at_once(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    many = [concurrency.begin() for _ in range(20)]
    clock.now += 1.9
    late = concurrency.begin()  # a little before the others are done
    clock.now += 0.1
    for one in many:
        concurrency.end(one, 1)
    clock.now += 0.1
    concurrency.end(late, 1)
    assert concurrency.claim_limit == 40


def test_an_engine_that_became_slow_is_known_after_some_answers(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    for _ in range(20):
        answer(concurrency, clock, 100, 1)
    answer(concurrency, clock, 10, 1)
    assert concurrency.claim_limit == 400
    for _ in range(8):
        answer(concurrency, clock, 10, 1)
    assert concurrency.claim_limit == 40


def test_a_worker_may_always_have_one_claim(concurrency: AdaptiveConcurrency, clock: Clock) -> None:
    answer(concurrency, clock, 1, 600)
    assert (concurrency.claim_limit, concurrency.batch_limit) == (1, 1)


def test_before_anything_is_known_one_batch_is_taken(concurrency: AdaptiveConcurrency) -> None:
    assert concurrency.batch_limit == 1


@pytest.mark.parametrize(("size", "batches"), [(1, 3), (16, 3), (32, 2), (33, 1), (1_024, 1)])
def test_before_the_rate_is_known_few_claims_are_taken_whatever_the_batches(
    size: int, batches: int, concurrency: AdaptiveConcurrency
) -> None:
    concurrency.accept(size)
    assert concurrency.batch_limit == batches


@pytest.mark.parametrize(
    ("rate", "batches"), [(1, 1), (31, 1), (32, 2), (47, 2), (49, 3), (9e9, 3)]
)
def test_the_batch_limit_is_what_the_worker_finishes_in_the_prefetch_time(
    rate: float, batches: int, concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 1_000, 1_000 / rate)
    for _ in range(5):
        concurrency.accept(64)
    assert concurrency.batch_limit == batches


def test_the_size_of_a_batch_is_a_mean_of_those_that_came_lately(
    concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 100, 1)  # 400 claims
    for _ in range(40):
        concurrency.accept(300)
    assert concurrency.batch_limit == 1
    concurrency.accept(1)  # a crumb does not change that
    assert concurrency.batch_limit == 1
    for _ in range(40):
        concurrency.accept(100)
    assert concurrency.batch_limit == 3


def test_where_work_is_lost_less_is_taken_until_it_is_not_lost_any_more(clock: Clock) -> None:
    concurrency = AdaptiveConcurrency(4.0, 64, clock)
    answer(concurrency, clock, 1_000, 1)
    for _ in range(40):
        concurrency.accept(64)
    assert concurrency.batch_limit == 62
    for _ in range(62):  # all batches in flight are delivered again
        concurrency.accept(64, redelivered=True)
    assert concurrency.batch_limit == 8
    assert concurrency.accept(1_000, redelivered=True) == 1_000  # no batch is cut for it
    for _ in range(100):
        concurrency.accept(64)
    assert concurrency.batch_limit >= 61


# Batches that share a request.


@pytest.mark.parametrize(
    ("size", "together"), [(1, 16), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1), (64, 1), (1_024, 1)]
)
def test_batches_go_to_the_engine_together_up_to_a_request_that_is_worth_it(
    size: int, together: int, clock: Clock
) -> None:
    concurrency = AdaptiveConcurrency(4.0, 64, clock)
    answer(concurrency, clock, 10_000, 1)
    for _ in range(40):
        concurrency.accept(size)
    assert concurrency.batches_per_request == together


def test_there_are_several_requests_at_the_engine_however_few_claims_it_may_have(
    clock: Clock,
) -> None:
    concurrency = AdaptiveConcurrency(4.0, 64, clock)
    assert concurrency.batches_per_request == 1
    answer(concurrency, clock, 10, 1)  # 40 claims in flight
    for _ in range(40):
        concurrency.accept(2)
    assert (concurrency.batch_limit, concurrency.batches_per_request) == (20, 5)
    slow = AdaptiveConcurrency(4.0, 64, clock)
    answer(slow, clock, 1, 600)
    slow.accept(1)
    assert slow.batches_per_request == 1


# Trimming.


@pytest.mark.parametrize(("came", "kept"), [(1, 1), (40, 40), (59, 59), (60, 40), (1_024, 40)])
def test_a_batch_is_trimmed_only_when_it_is_much_larger_than_the_limit(
    came: int, kept: int, concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 10, 1)
    assert concurrency.accept(came) == kept


@pytest.mark.parametrize(("came", "kept"), [(8, 8), (11, 11), (12, 8), (64, 8)])
def test_no_batch_is_trimmed_to_very_few_claims_however_slow_the_engine(
    came: int, kept: int, concurrency: AdaptiveConcurrency, clock: Clock
) -> None:
    answer(concurrency, clock, 1, 60)
    assert concurrency.accept(came) == kept


def test_with_an_endless_prefetch_time_nothing_is_trimmed(clock: Clock) -> None:
    concurrency = AdaptiveConcurrency(7 * 24 * 3600.0, 3, clock)
    answer(concurrency, clock, 1, 60)
    assert concurrency.accept(1_024) == 1_024
    assert concurrency.batch_limit == 3
