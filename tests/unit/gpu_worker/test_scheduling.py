"""Which context to take next: rules, properties, and a thousand workers that decide alone."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import ContextDemand, ContextSpec
from services.contracts.control import CONTROL_UPDATE_SECONDS
from services.gpu_worker.scheduling import (
    BETTER_BY,
    COLD_SECONDS,
    PATIENCE_SECONDS,
    SHORTEST_STAY_SECONDS,
    STAY_COSTS,
    Situation,
    Stay,
    Switch,
    next_context,
)

CONTEXTS = [ContextSpec(model=f"org/model-{number}") for number in range(6)]
A, B, C, D, *_ = CONTEXTS


def line(context: ContextSpec, ready: int, workers: int = 0) -> ContextDemand:
    return ContextDemand(
        context=context, claims_ready=ready, claims_in_flight=0, workers_warm=workers
    )


def idle(here: ContextSpec | None = A, **changes: object) -> Situation:
    """A worker that has had nothing to do for half a minute, and 10 claims/s otherwise."""
    fields: dict[str, object] = {
        "here": here and here.context_id,
        "queue_empty": True,
        "idle_seconds": 30.0,
        "since_ready_seconds": 1_000.0,
        "claims_per_second": 10.0,
        "start_seconds": {context.context_id: 0.0 for context in CONTEXTS},
        "random_draw": 0.0,
    }
    return Situation(**{**fields, **changes})  # type: ignore[arg-type]


def busy(here: ContextSpec = A, **changes: object) -> Situation:
    return idle(here, **{"queue_empty": False, "idle_seconds": 0.0, **changes})


def ready_in(**seconds: float) -> Mapping[str, float]:
    return {globals()[name].context_id: taken for name, taken in seconds.items()}


def goes_to(decision: Stay | Switch) -> ContextSpec | None:
    return decision.context if isinstance(decision, Switch) else None


# The rules, one by one.


@pytest.mark.parametrize("worker", [idle(), busy(), idle(None)], ids=["idle", "busy", "new"])
@pytest.mark.parametrize("directory", [(), (line(A, 100, 1),), (line(B, 0, 5),)])
def test_where_nothing_waits_elsewhere_a_worker_stays(
    worker: Situation, directory: Sequence[ContextDemand]
) -> None:
    if worker.here is None and directory and directory[0].claims_ready:
        return
    assert next_context(directory, worker) == Stay("no claims wait elsewhere")


def test_an_idle_worker_goes_where_work_waits() -> None:
    decision = next_context([line(B, 10_000)], idle())
    assert decision == Switch(
        B, "1,000 s of work wait there, 0 workers are there, and it is ready in 0.0 s"
    )


def test_an_idle_worker_goes_only_when_the_work_there_exceeds_the_switch() -> None:
    cold = idle(start_seconds=ready_in(B=60), idle_seconds=30.0)
    # For each of the two workers then: 59 s, and 61 s.
    assert goes_to(next_context([line(A, 0, 1), line(B, 1_180, 1)], cold)) is None
    assert goes_to(next_context([line(A, 0, 1), line(B, 1_220, 1)], cold)) == B


def test_a_queue_that_has_only_just_become_empty_is_waited_for() -> None:
    worker = idle(idle_seconds=PATIENCE_SECONDS - 0.1)
    assert goes_to(next_context([line(B, 10_000)], worker)) is None


def test_a_little_work_where_nobody_is_is_done_by_who_idled_as_long_as_it_takes_to_come() -> None:
    directory = [line(A, 0, 1), line(B, 5)]
    cold = ready_in(B=60)
    assert goes_to(next_context(directory, idle(start_seconds=cold, idle_seconds=59.0))) is None
    assert goes_to(next_context(directory, idle(start_seconds=cold, idle_seconds=60.0))) == B


def test_a_context_of_which_nothing_is_known_is_taken_to_be_cold() -> None:
    directory = [line(A, 0, 1), line(B, round(COLD_SECONDS * 10) - 1)]
    assert goes_to(next_context(directory, idle(start_seconds={}, idle_seconds=10.0))) is None
    more = [line(A, 0, 1), line(B, round(COLD_SECONDS * 10) + 1)]
    assert goes_to(next_context(more, idle(start_seconds={}, idle_seconds=10.0))) == B


def test_what_is_warm_here_comes_first() -> None:
    directory = [line(A, 0, 1), line(B, 50_000), line(C, 10_000)]
    for warm, first in ((ready_in(B=60, C=0), C), (ready_in(B=0, C=60), B)):
        draws = {
            goes_to(next_context(directory, idle(start_seconds=warm, random_draw=n / 10)))
            for n in range(10)
        }
        assert draws == {first}


def test_a_new_worker_prefers_what_its_node_holds_warm() -> None:
    directory = [line(B, 50_000), line(C, 10_000)]
    drawn = [
        goes_to(
            next_context(directory, idle(None, start_seconds=ready_in(C=0), random_draw=n / 100))
        )
        for n in range(100)
    ]
    assert drawn.count(C) > 80


def test_of_many_new_workers_one_soon_goes_where_nobody_is_and_the_others_do_not() -> None:
    directory = [line(B, 10)]  # a second's work, a minute away
    random_draws = [n / 1_000 for n in range(1_000)]
    for seconds, goers in ((2.0, 33), (30.0, 500), (60.0, 1_000)):
        drawn = [
            goes_to(
                next_context(
                    directory,
                    idle(
                        None,
                        start_seconds=ready_in(B=60),
                        idle_seconds=seconds,
                        random_draw=random_draw,
                    ),
                )
            )
            for random_draw in random_draws
        ]
        assert drawn.count(B) == pytest.approx(goers, abs=2)


def test_new_workers_spread_in_proportion_to_the_work() -> None:
    directory = [line(B, 30_000), line(C, 60_000), line(D, 0, 3)]
    drawn = [
        goes_to(next_context(directory, idle(None, start_seconds={}, random_draw=n / 300)))
        for n in range(300)
    ]
    assert drawn.count(B) == pytest.approx(100, abs=1)
    assert drawn.count(C) == pytest.approx(200, abs=1)


def test_a_busy_worker_leaves_for_much_more_work_elsewhere() -> None:
    here, cost = 1_000, 60
    worker = busy(start_seconds=ready_in(B=cost), since_ready_seconds=10_000.0)
    enough = round(10 * (BETTER_BY * here / 10 + cost))
    for ready, goes in ((enough, None), (enough + 10, B)):
        drawn = {
            goes_to(next_context([line(A, here, 1), line(B, ready)], worker)) for _ in range(3)
        }
        assert drawn == {goes}


@pytest.mark.parametrize(
    ("worker", "least"),
    [
        (busy(start_seconds=ready_in(B=60)), STAY_COSTS * 60),
        (busy(start_seconds=ready_in(B=1)), SHORTEST_STAY_SECONDS),
        (idle(start_seconds=ready_in(B=60)), SHORTEST_STAY_SECONDS),
    ],
    ids=["busy, cold", "busy, warm", "idle"],
)
def test_who_has_just_come_stays_for_a_while(worker: Situation, least: float) -> None:
    directory = [line(A, 10, 1), line(B, 100_000)]
    for since, goes in ((least - 0.1, None), (least, B)):
        fields = {name: getattr(worker, name) for name in Situation.__dataclass_fields__}
        moved = Situation(**{**fields, "since_ready_seconds": since})
        assert goes_to(next_context(directory, moved)) == goes


def test_who_is_where_the_claims_are_does_not_make_way() -> None:
    # B has more than its share already; C lacks many, but its work is not worth leaving for.
    directory = [line(A, 5_000, 5), line(B, 1_000, 50), line(C, 6_000, 5)]
    assert goes_to(next_context(directory, busy(A))) is None


# Properties.

SECONDS = st.floats(min_value=0, max_value=10_000)
LINES = st.lists(
    st.builds(
        line, st.sampled_from(CONTEXTS), st.integers(0, 10**7) | st.just(0), st.integers(0, 2_000)
    ),
    max_size=6,
    unique_by=lambda each: each.context.context_id,
)
IDS = [context.context_id for context in CONTEXTS]
SITUATIONS = st.builds(
    Situation,
    here=st.none() | st.sampled_from(IDS) | st.just("ctx-elsewhere"),
    queue_empty=st.booleans(),
    idle_seconds=SECONDS,
    since_ready_seconds=SECONDS,
    claims_per_second=st.none() | st.floats(min_value=0, max_value=10_000),
    start_seconds=st.dictionaries(st.sampled_from(IDS), SECONDS),
    random_draw=st.floats(min_value=0, max_value=1, exclude_max=True),
)


@given(LINES, SITUATIONS)
def test_the_same_demand_and_situation_give_the_same_decision(
    directory: list[ContextDemand], worker: Situation
) -> None:
    assert next_context(directory, worker) == next_context(list(directory), worker)


@given(LINES, SITUATIONS)
def test_nobody_goes_where_no_claims_are_ready_or_where_they_are_already(
    directory: list[ContextDemand], worker: Situation
) -> None:
    target = goes_to(next_context(directory, worker))
    if target is not None:
        (there,) = [each for each in directory if each.context == target]
        assert there.claims_ready > 0
        assert target.context_id != worker.here


@given(LINES, SITUATIONS)
def test_nobody_leaves_a_queue_with_work_for_less_work_a_worker(
    directory: list[ContextDemand], worker: Situation
) -> None:
    target = goes_to(next_context(directory, worker))
    if target is None or worker.queue_empty or worker.here is None:
        return
    lines = {each.context.context_id: each for each in directory}
    here, there = lines.get(worker.here), lines[target.context_id]
    ready_here = here.claims_ready / max(1, here.workers_warm) if here else 0
    assert there.claims_ready / (there.workers_warm + 1) > ready_here


@given(LINES, SITUATIONS)
def test_nobody_switches_twice_within_the_shortest_stay(
    directory: list[ContextDemand], worker: Situation
) -> None:
    target = goes_to(next_context(directory, worker))
    if target is not None and worker.here is not None:
        cost = worker.start_seconds.get(target.context_id, COLD_SECONDS)
        stays = SHORTEST_STAY_SECONDS if worker.queue_empty else STAY_COSTS * cost
        assert worker.since_ready_seconds >= max(SHORTEST_STAY_SECONDS, stays)


# A thousand workers.


@dataclass
class Fleet:
    """Workers that receive the same control updates and decide alone. Times in seconds.

    A mover is in nobody's count until its context is ready, after `cost`.
    """

    ready: dict[str, float]
    at: list[str]
    cost: float
    claims_per_second: float = 10.0
    consumes: bool = False
    now: float = 1_000.0
    moves: int = 0
    arrives: dict[int, float] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    emptied: dict[str, float] = field(default_factory=dict)
    random_draws: random.Random = field(default_factory=lambda: random.Random(1))

    def count(self, context: ContextSpec) -> int:
        """Those that are there, and those on their way."""
        return self.at.count(context.context_id)

    def directory(self) -> list[ContextDemand]:
        warm = [
            context_id for number, context_id in enumerate(self.at) if number not in self.arrives
        ]
        return [
            line(context, int(self.ready.get(context.context_id, 0)), count)
            for context in CONTEXTS
            if (count := warm.count(context.context_id)) or context.context_id in self.ready
        ]

    def update(self) -> int:
        """All receive one control update. Returns how many go."""
        for number in [number for number, then in self.arrives.items() if then <= self.now]:
            self.since[number] = self.arrives.pop(number)
        directory, moved = self.directory(), 0
        for number, here in enumerate(self.at):
            if number in self.arrives:
                continue
            empty = self.ready.get(here, 0) < 1
            since = self.since.get(number, 0.0)
            idle_since = max(since, self.emptied.setdefault(here, self.now)) if empty else self.now
            worker = Situation(
                here=here,
                queue_empty=empty,
                idle_seconds=self.now - idle_since,
                since_ready_seconds=self.now - since,
                claims_per_second=self.claims_per_second,
                start_seconds=dict.fromkeys(IDS, self.cost),
                random_draw=self.random_draws.random(),
            )
            target = goes_to(next_context(directory, worker))
            if target is not None:
                self.at[number] = target.context_id
                self.arrives[number] = self.now + self.cost
                moved += 1
        if self.consumes:
            for each in directory:
                done = each.workers_warm * self.claims_per_second * CONTROL_UPDATE_SECONDS
                context_id = each.context.context_id
                self.ready[context_id] = max(0.0, self.ready.get(context_id, 0) - done)
        self.now += CONTROL_UPDATE_SECONDS
        self.moves += moved
        return moved


def fleet(workers: Mapping[str, int], cost: float, **ready: float) -> Fleet:
    names = {name: globals()[name].context_id for name in "ABCD"}
    at = [names[name] for name, count in workers.items() for _ in range(count)]
    made = Fleet({names[name]: claims for name, claims in ready.items()}, at, cost)
    made.emptied = {names["A"]: made.now - PATIENCE_SECONDS}
    return made


def test_a_thousand_idle_workers_go_where_all_the_work_is() -> None:
    workers = fleet({"A": 1_000}, 60.0, B=10_000_000)
    assert workers.update() == 1_000


def test_of_a_thousand_idle_workers_only_as_many_go_as_the_switch_pays_for() -> None:
    # 1 s to come, 3,000 claims at 10 a second: 300 workers have work for a second.
    workers = fleet({"A": 1_000}, 1.0, B=3_000)
    assert workers.update() == pytest.approx(300, abs=50)


def test_of_a_thousand_busy_workers_the_fair_share_goes_after_one_update() -> None:
    workers = fleet({"A": 1_000}, 1.0, A=1_000_000, B=1_000_000)
    assert workers.update() == pytest.approx(500, abs=50)
    workers.update()
    assert workers.update() < 20


@pytest.mark.parametrize("cost", [0.0, 1.0, 20.0, 60.0])
def test_all_contexts_with_work_soon_have_workers_in_proportion(cost: float) -> None:
    workers = fleet({"A": 1_000}, cost, B=1_000_000, C=2_000_000, D=3_000_000)
    for _ in range(10 + round(6 * cost / CONTROL_UPDATE_SECONDS)):
        workers.update()
    assert workers.count(A) == 0
    for context, share in ((B, 1 / 6), (C, 2 / 6), (D, 3 / 6)):
        assert workers.count(context) == pytest.approx(1_000 * share, rel=0.25)


@pytest.mark.parametrize("cost", [20.0, 60.0])
def test_while_movers_are_not_counted_yet_not_many_more_follow(cost: float) -> None:
    workers = fleet({"A": 1_000}, cost, A=10_000_000, B=10_000_000)
    most = 0
    for _ in range(round(8 * cost / CONTROL_UPDATE_SECONDS)):
        workers.update()
        most = max(most, workers.count(B))
    assert 400 < workers.count(B) < 600
    assert most < 600
    assert workers.moves < 650  # nobody went to and fro


@pytest.mark.parametrize("seed", range(3))
def test_a_few_claims_without_a_worker_are_not_left_to_chance(seed: int) -> None:
    workers = fleet({"A": 1_000}, 60.0, B=20)
    workers.random_draws = random.Random(seed)
    for _ in range(30 + 29):  # idle for 60 s, and until the first of them would be there
        workers.update()
    assert 1 <= workers.count(B) < 30


def test_workers_do_not_flap_between_contexts_with_equal_work() -> None:
    workers = fleet({"A": 500, "B": 500}, 0.0, A=1_000_000, B=1_100_000)
    assert sum(workers.update() for _ in range(100)) == 0


@pytest.mark.parametrize("cost", [0.0, 30.0])
def test_every_claim_is_answered_and_the_fleet_is_little_idle(cost: float) -> None:
    claims = {"B": 1_000_000.0, "C": 300_000.0, "D": 20.0}
    workers = fleet({"A": 1_000}, cost, **claims)
    workers.consumes = True
    began = workers.now
    while any(workers.ready.values()):
        workers.update()
        assert workers.now < began + 3_600, workers.ready
    alone = sum(claims.values()) / (1_000 * workers.claims_per_second)
    # All work, shared by all from the first second; beginning and end take some switches.
    assert workers.now - began < 1.5 * alone + 5 * cost + 30
