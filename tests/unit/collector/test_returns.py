"""Claims that workers return go to their queue again if they are still wanted."""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.broker import Delivery, Outgoing
from services.collector.collector import republish_wanted
from services.contracts import ClaimBatch, Run, decode, encode, load_settings, topology
from services.store import Store, find_run


class Broker:
    """Consumer and publisher in one: what was acknowledged, and what was published."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.published: list[Outgoing] = []
        self.declared: list[str] = []

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        self.acknowledged += [delivery.tag for delivery in deliveries]

    def also_declare(self, context_id: str) -> None:
        self.declared.append(context_id)

    def publish(self, message: Outgoing) -> None:
        self.published.append(message)

    def claims(self) -> list[str]:
        return [c.claim_id for m in self.published for c in decode(ClaimBatch, m.body).claims]


@pytest.fixture
def broker() -> Broker:
    return Broker()


def send(batch: ClaimBatch, store: Store, broker: Broker, **headers: object) -> None:
    delivery = Delivery(
        topology.RETURNS_QUEUE, encode(batch), headers, "r/b/1/0", False, 7, 1, kind="ClaimBatch"
    )
    republish_wanted(batch, delivery, store, broker, broker)  # type: ignore[arg-type]


def test_a_returned_batch_goes_to_the_queue_of_its_context_as_it_came(
    store: Store, make: SimpleNamespace, run: Run, broker: Broker
) -> None:
    store.write(make.incoming(make.announced()))
    batch = make.returned(1, 2)
    send(batch, store, broker)
    (message,) = broker.published
    assert decode(ClaimBatch, message.body) == batch
    assert message.exchange == topology.CLAIMS_EXCHANGE
    assert message.routing_key == topology.claims_queue(run.context.context_id)
    assert (message.kind, message.message_id) == ("ClaimBatch", "r/b/1/0")
    assert broker.declared == [run.context.context_id]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_the_failures_that_claims_were_part_of_go_with_them(
    failures: int, store: Store, make: SimpleNamespace, broker: Broker
) -> None:
    store.write(make.incoming(make.announced()))
    send(make.returned(1), store, broker, **{topology.FAILURES_HEADER: failures})
    assert broker.published[0].headers == {topology.FAILURES_HEADER: failures}


def test_the_engines_that_could_not_answer_claims_go_with_them(
    store: Store, make: SimpleNamespace, broker: Broker
) -> None:
    store.write(make.incoming(make.announced()))
    headers = {
        topology.FAILURES_HEADER: 1,
        topology.DECLINED_HEADER: ["unable n1/a"],
        topology.WAITED_HEADER: 10,
    }
    send(make.returned(1), store, broker, **headers)
    assert broker.published[0].headers == headers


def test_a_return_is_acknowledged_only_once_the_broker_has_its_claims(
    store: Store, make: SimpleNamespace, broker: Broker
) -> None:
    store.write(make.incoming(make.announced()))
    send(make.returned(1), store, broker)
    assert broker.acknowledged == []
    (message,) = broker.published
    assert message.on_confirmed is not None
    message.on_confirmed()
    assert broker.acknowledged == [7]


def test_claims_that_have_an_outcome_by_now_are_not_sent_again(
    store: Store, make: SimpleNamespace, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(), make.batch(make.verdict(1)), make.dead(3)))
    send(make.returned(1, 2, 3, 4), store, broker)
    assert broker.claims() == ["c2", "c4"]


def test_when_every_claim_has_an_outcome_nothing_is_sent(
    store: Store, make: SimpleNamespace, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(), make.batch(make.verdict(1))))
    send(make.returned(1), store, broker)
    assert (broker.published, broker.acknowledged) == ([], [7])


def test_claims_of_a_cancelled_submission_end_here(
    store: Store, make: SimpleNamespace, run: Run, broker: Broker
) -> None:
    store.write(make.incoming(make.announced(submission_id="sub-1")))
    store.cancel(find_run(store, run.run_id).run_key)
    store.write(make.incoming(make.announced(submission_id="sub-2")))
    send(make.returned(1, submission_id="sub-1"), store, broker)
    assert (broker.published, broker.acknowledged) == ([], [7])
    send(make.returned(1, submission_id="sub-2"), store, broker)
    assert broker.claims() == ["c1"]


def test_a_claim_that_is_in_a_returned_batch_many_times_is_sent_on_once(
    store: Store, make: SimpleNamespace, broker: Broker
) -> None:
    store.write(make.incoming(make.announced()))
    send(make.returned(1, 2, 1, 1), store, broker)
    assert sorted(broker.claims()) == ["c1", "c2"]


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory, make: SimpleNamespace) -> Iterator[Store]:
    """Of ten claims those with an even number have a verdict."""
    path = tmp_path_factory.mktemp("returns") / "s.sqlite"
    store = Store.open(load_settings(store_url=str(path)))
    verdicts = [make.verdict(number) for number in range(0, 10, 2)]
    store.write(make.incoming(make.announced(), make.batch(*verdicts)))
    yield store
    store.close()


@given(numbers=st.lists(st.integers(0, 9), min_size=1, unique=True))
def test_whatever_is_returned_is_sent_on_once_or_has_an_outcome(
    numbers: list[int], half_done: Store, make: SimpleNamespace
) -> None:
    broker = Broker()
    send(make.returned(*numbers), half_done, broker)
    assert broker.claims() == [f"c{number}" for number in numbers if number % 2]
