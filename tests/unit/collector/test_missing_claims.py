"""Claims in no queue and at no worker are reported as missing, and only those."""

from collections import Counter
from types import SimpleNamespace

import pytest

from services.collector.demand import DemandEstimator
from services.collector.missing_claims import MISSING_SECONDS, MissingClaims
from services.contracts import Run, RunAnnouncement, Totals, load_settings, topology
from services.contracts.proofs import Positions
from services.store import Store, missing_records, run_status
from tests.unit.clock import Clock

EMPTY = dict.fromkeys(topology.CORE_QUEUES, 0)


class World:
    """A demand estimator, a fleet, and a clock, all controlled by the test."""

    def __init__(self, store: Store, run: Run) -> None:
        self.store = store
        self.run = run
        self.clock = Clock()
        self.held: Counter[str] = Counter()
        fleet = SimpleNamespace(claims_held=lambda: self.held)
        self.demand = DemandEstimator(store, load_settings(), fleet)  # type: ignore[arg-type]
        self.demand._counts = EMPTY
        self.demand._counted = frozenset({topology.claims_queue(run.context.context_id)})
        self.demand.counted_at = self.clock.now
        self.demand.unfinished = {run.run_id: run.context.context_id}
        self.missing = MissingClaims(store, self.demand, 30, self.clock)

    def wait(self, seconds: float, *, disconnected: bool = False) -> None:
        for _ in range(int(seconds / 2)):
            self.clock.now += 2
            if not disconnected:
                self.demand.counted_at = self.clock.now
            self.missing.check()

    @property
    def told(self) -> bool:
        status = run_status(self.store, self.run.run_id)
        assert status is not None
        return status.nowhere_since is not None


@pytest.fixture
def world(store: Store, run: Run, make: SimpleNamespace) -> World:
    positions = Positions()
    positions.add([0, 1, 3, 4, 5, 9])
    store.write(
        make.incoming(
            RunAnnouncement(
                run=run,
                submission_id="sub-1",
                totals=Totals(lines=10, claims=6, repeated=0, rejected=4),
                positions=positions.as_text(),
            ),
            make.batch(make.verdict(1)),
            make.dead(4),
        )
    )
    return World(store, run)


def test_claims_missing_for_long_enough_are_reported_by_their_records(world: World) -> None:
    world.wait(MISSING_SECONDS - 2)
    assert not world.told
    world.wait(6)
    assert world.told
    run_id = world.run.run_id
    assert missing_records(world.store, run_id, 10) == [(1, 1), (4, 4), (6, 6), (10, 10)]
    assert missing_records(world.store, run_id, 2) == [(1, 1), (4, 4)]


@pytest.mark.parametrize("queue", [*topology.CORE_QUEUES, "claims"])
def test_what_waits_in_a_queue_is_somewhere(queue: str, world: World) -> None:
    name = topology.claims_queue(world.run.context.context_id) if queue == "claims" else queue
    world.demand._counts = {**EMPTY, name: 1}
    world.wait(2 * MISSING_SECONDS)
    # What lies in `dead-messages` comes back by a person's hand alone.
    assert world.told == (queue == topology.DEAD_MESSAGES_QUEUE)


def test_a_queue_that_the_broker_was_not_asked_about_may_hold_them(world: World) -> None:
    world.demand._counted = frozenset()
    world.wait(2 * MISSING_SECONDS)
    assert not world.told


def test_what_a_worker_has_in_hand_is_somewhere(world: World) -> None:
    world.held[world.run.context.context_id] = 1
    world.wait(2 * MISSING_SECONDS)
    assert not world.told


def test_an_outdated_count_of_the_broker_proves_nothing(world: World) -> None:
    world.wait(2 * MISSING_SECONDS, disconnected=True)
    assert not world.told
    world.wait(MISSING_SECONDS - 2)
    assert not world.told


def test_after_a_pause_in_the_checks_the_observation_starts_anew(world: World) -> None:
    world.wait(MISSING_SECONDS - 4)
    world.clock.now += 60
    world.wait(MISSING_SECONDS - 4)
    assert not world.told


def test_a_commit_of_the_run_clears_the_mark_and_starts_anew(
    world: World, make: SimpleNamespace
) -> None:
    world.wait(MISSING_SECONDS - 4)
    world.missing.note({world.run.run_id})
    world.wait(MISSING_SECONDS - 4)
    assert not world.told
    world.wait(8)
    assert world.told
    world.store.write(make.incoming(make.batch(make.verdict(3))))
    world.missing.note({world.run.run_id})
    assert not world.told


def test_missing_records_are_unknown_if_the_producer_did_not_announce_them(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(claims=3)))
    assert missing_records(store, run.run_id, 10) is None
