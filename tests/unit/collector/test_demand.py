"""The directory, from a real store and a broker's answers."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from services.broker import Counts
from services.collector.demand import DemandEstimator
from services.collector.fleet import Fleet
from services.contracts import ContextDemand, ContextSpec, Run, load_settings, topology
from services.contracts.control import MAX_CONTEXTS, MAX_CONTEXTS_BYTES, ControlUpdate
from services.contracts.heartbeats import HEARTBEAT_SECONDS, HEARTBEAT_TIMEOUT_SECONDS
from services.contracts.wire import encode
from services.store import Store, dead_claims, find_run, reopen_dead


class Broker:
    """Answers with the queues that it has: context -> batches ready."""

    def __init__(self) -> None:
        self.has: dict[ContextSpec, int] = {}
        self.asked: list[str] = []
        self.answers = True

    def request_counts(self, queues: Sequence[str], heard: Callable[[Counts], None]) -> None:
        self.asked = list(queues)
        there = {
            topology.claims_queue(context.context_id): batches
            for context, batches in self.has.items()
        }
        if self.answers:
            heard({queue: there[queue] for queue in queues if queue in there})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    """One that was listened to for long enough."""
    listening = Fleet(clock)
    listening.heard_from_all()
    clock.now += HEARTBEAT_SECONDS
    return listening


Serve = Callable[[Run, int], None]


@pytest.fixture
def serve(fleet: Fleet, make: SimpleNamespace) -> Serve:
    """`serve(run, 7)`: seven workers say that they serve the context of the run."""

    def report(run: Run, workers: int) -> None:
        context_id = run.context.context_id
        for number in range(workers):
            fleet.note(make.report(f"{context_id}-{number}", context_id=context_id))

    return report


@pytest.fixture
def demand(store: Store, fleet: Fleet) -> DemandEstimator:
    return DemandEstimator(store, load_settings(batch_size=10, batches_in_flight=3), fleet)


def looked(demand: DemandEstimator, broker: Broker) -> tuple[ContextDemand, ...]:
    """After the broker was asked."""
    demand.update()
    demand.request_counts(broker)  # type: ignore[arg-type]
    return demand.update()


def of(run: Run, number: int) -> Run:
    """Another run, which wants a context of its own."""
    context = run.context.model_copy(update={"model": f"models/{number}"})
    return run.model_copy(update={"context": context})


def test_what_is_left_is_ready_or_in_flight(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
    serve: Serve,
) -> None:
    # Batches of 2: that is what came back.
    store.write(
        make.incoming(
            make.announced(claims=100),
            make.batch(make.verdict(0), make.verdict(1)),
            make.batch(make.verdict(2), make.verdict(3)),
            make.dead(4),
        )
    )
    broker.has[run.context] = 30
    serve(run, 7)
    assert looked(demand, broker) == (
        ContextDemand(context=run.context, claims_ready=60, claims_in_flight=35, workers_warm=7),
    )


def test_no_more_is_ready_than_is_left(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(claims=12)))
    broker.has[run.context] = 30
    (line,) = looked(demand, broker)
    assert (line.claims_ready, line.claims_in_flight) == (12, 0)


@pytest.mark.parametrize(
    ("claims", "ready", "in_flight"),
    [
        (None, 50, 40),  # not all are sent: what is left is not known
        (100, 50, 50),
        (60, 50, 40),  # the queue was counted before the workers took the last batches
        (30, 30, 30),
    ],
)
def test_no_less_is_in_flight_than_workers_hold(
    claims: int | None,
    ready: int,
    in_flight: int,
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
    fleet: Fleet,
) -> None:
    store.write(make.incoming(make.announced(claims=claims)))
    broker.has[run.context] = 5
    for worker, held, state in (("one", 25, "serving"), ("other", 15, "draining")):
        report = make.report(worker, context_id=run.context.context_id, state=state)
        fleet.note(report.model_copy(update={"claims_in_hand": held}))
    (line,) = looked(demand, broker)
    assert (line.claims_ready, line.claims_in_flight) == (ready, in_flight)


def test_it_moves_on_with_each_commit_of_any_collector_of_the_store(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(claims=100)))
    broker.has[run.context] = 0
    looked(demand, broker)
    for number in range(5):
        store.write(make.incoming(make.batch(make.verdict(number)), make.dead(5)))
    (line,) = demand.update()
    assert line.claims_in_flight == 94


def test_a_complete_run_has_no_demand(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(claims=1), make.batch(make.verdict(0))))
    broker.has[run.context] = 4
    assert looked(demand, broker) == ()


def test_a_run_of_which_claims_are_sent_again_has_a_demand_again(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(claims=2), make.batch(make.verdict(0)), make.dead(1)))
    broker.has[run.context] = 1
    assert looked(demand, broker) == ()
    # As `keepwarm dead retry` does.
    store.add_submission(find_run(store, run.run_id).run_key, "sub-again", "0" * 32)
    reopen_dead(store, dead_claims(store))
    assert [line.claims_ready for line in looked(demand, broker)] == [1]


def test_a_context_whose_runs_are_done_or_cancelled_is_listed_while_workers_hold_it(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
    serve: Serve,
    clock: Clock,
) -> None:
    cancelled, done, left_alone = of(run, 1), of(run, 2), of(run, 3)
    store.write(
        make.incoming(
            make.announced(claims=5, of=cancelled),
            make.announced(claims=1, of=done),
            make.batch(make.verdict(0), of=done),
            make.announced(claims=1, of=left_alone),
            make.batch(make.verdict(0), of=left_alone),
        )
    )
    store.cancel(find_run(store, cancelled.run_id).run_key)
    broker.has = {cancelled.context: 5, left_alone.context: 0}
    serve(cancelled, 1)
    serve(done, 20)
    found = {line.context: line for line in looked(demand, broker)}
    assert found.keys() == {cancelled.context, done.context}
    assert {line.claims_ready + line.claims_in_flight for line in found.values()} == {0}
    assert found[cancelled.context].workers_warm == 1
    assert found[done.context].workers_warm == 20
    clock.now += HEARTBEAT_TIMEOUT_SECONDS
    assert looked(demand, broker) == ()


def test_a_wanted_context_stays_when_its_workers_fall_silent(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
    serve: Serve,
    clock: Clock,
) -> None:
    store.write(make.incoming(make.announced(claims=30)))
    broker.has[run.context] = 2
    serve(run, 3)
    assert [line.workers_warm for line in looked(demand, broker)] == [3]
    clock.now += HEARTBEAT_TIMEOUT_SECONDS - HEARTBEAT_SECONDS
    assert [line.workers_warm for line in demand.update()] == [3]
    clock.now += HEARTBEAT_SECONDS
    assert [(line.claims_ready, line.workers_warm) for line in demand.update()] == [(20, 0)]


def test_there_is_no_demand_before_every_worker_had_time_for_a_heartbeat(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(claims=30)))
    broker.has[run.context] = 2
    clock = Clock()
    fresh = DemandEstimator(store, load_settings(batch_size=10), Fleet(clock))
    assert looked(fresh, broker) == ()
    clock.now += HEARTBEAT_SECONDS
    assert [line.claims_ready for line in fresh.update()] == [20]


def test_runs_on_one_context_are_one_line(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    other_run: Run,
    demand: DemandEstimator,
    broker: Broker,
) -> None:
    store.write(make.incoming(make.announced(claims=10), make.announced(claims=20, of=other_run)))
    broker.has[run.context] = 0
    assert [line.claims_in_flight for line in looked(demand, broker)] == [30]


def test_a_context_has_no_demand_before_its_queue_was_counted(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(claims=10)))
    broker.has[run.context] = 1
    broker.answers = False
    assert looked(demand, broker) == ()
    broker.answers = True
    assert len(looked(demand, broker)) == 1
    # No later answer: what was said last stays.
    broker.answers = False
    assert len(looked(demand, broker)) == 1


def test_the_broker_is_asked_about_the_queues_that_runs_want_and_no_others(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
    serve: Serve,
) -> None:
    store.write(make.incoming(make.announced(claims=1), make.batch(make.verdict(0))))
    serve(run, 1)
    queue = topology.claims_queue(run.context.context_id)
    looked(demand, broker)
    assert broker.asked == []
    wanted = run.model_copy(update={"source_digest": "src-more"})
    store.write(make.incoming(make.announced(claims=1, of=wanted)))
    for _ in range(2):  # one that is missing may come
        broker.asked = []
        looked(demand, broker)
        assert broker.asked == [queue]


def test_a_run_that_was_never_announced_has_no_context_to_tell(
    store: Store, make: SimpleNamespace, demand: DemandEstimator, broker: Broker
) -> None:
    store.write(make.incoming(make.batch(make.verdict(0))))
    assert looked(demand, broker) == ()
    assert broker.asked == []


def test_a_new_estimator_on_the_same_store_broker_and_workers_agrees(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
    fleet: Fleet,
    serve: Serve,
) -> None:
    store.write(make.incoming(make.announced(claims=40), make.dead(0)))
    broker.has[run.context] = 2
    serve(run, 3)
    looked(demand, broker)
    store.write(make.incoming(make.batch(*map(make.verdict, range(1, 9)))))
    again = DemandEstimator(store, load_settings(), fleet)
    (before,), (after,) = demand.update(), looked(again, broker)
    assert before == after
    assert before.claims_ready + before.claims_in_flight == 31
    assert before.workers_warm == 3


def test_the_most_wanted_come_first_and_no_more_than_a_notice_holds(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    broker: Broker,
) -> None:
    for number in range(MAX_CONTEXTS + 1):
        each = of(run, number)
        store.write(make.incoming(make.announced(claims=10_000, of=each)))
        broker.has[each.context] = number % 7
    lines = looked(demand, broker)
    assert len(lines) == MAX_CONTEXTS
    ready = [line.claims_ready for line in lines]
    assert ready == sorted(ready, reverse=True)


def test_contexts_with_very_long_arguments_are_cut_so_that_every_worker_can_take_the_notice(
    store: Store, make: SimpleNamespace, run: Run, demand: DemandEstimator, broker: Broker
) -> None:
    for number in range(30):
        each = of(run, number)
        long = each.context.model_copy(update={"engine_arguments": ("Ł" * 512,) * 128})
        each = each.model_copy(update={"context": long})
        store.write(make.incoming(make.announced(claims=10_000, of=each)))
        broker.has[long] = number
    lines = looked(demand, broker)
    assert [line.claims_ready for line in lines] == [10 * (29 - place) for place in range(7)]
    assert len(encode(ControlUpdate(contexts=lines))) <= MAX_CONTEXTS_BYTES + 100


def test_a_cancelled_run_is_settled_once_no_queue_and_no_worker_can_have_its_claims(
    store: Store,
    make: SimpleNamespace,
    run: Run,
    demand: DemandEstimator,
    fleet: Fleet,
) -> None:
    store.write(make.incoming(make.announced(claims=100)))
    store.cancel(find_run(store, run.run_id).run_key)
    queue = topology.claims_queue(run.context.context_id)
    counts: dict[str, int] = {}

    class Asked:
        def request_counts(self, queues: Sequence[str], heard: Callable[[Counts], None]) -> None:
            assert queue in queues
            heard(counts)

    def settled() -> bool:
        demand.update()
        demand.request_counts(Asked(), topology.CORE_QUEUES)  # type: ignore[arg-type]
        return demand.settled_runs() == {run.run_id}

    assert demand.settled_runs() == set()  # nobody was asked yet
    counts = {topology.RETURNS_QUEUE: 0, queue: 3}
    assert not settled()
    counts[queue] = 0
    assert settled()
    counts[topology.RETURNS_QUEUE] = 1
    assert not settled()
    counts = {topology.RETURNS_QUEUE: 0}  # the queue was deleted
    assert settled()
    fleet.note(make.report("node-1", claims_in_hand=8))
    assert not settled()
