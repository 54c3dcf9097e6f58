"""The consumer, against a real node."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from services.broker import (
    BrokerAddress,
    Consumer,
    Counts,
    Declares,
    Delivery,
    Outgoing,
    PrivateNode,
    Publisher,
    link,
)
from services.contracts import load_settings, topology
from tests.integration.conftest import (
    PATIENCE,
    cut,
    delete_queues,
    ended,
    let_queues_age,
    messages_in,
    wait_for_messages,
    wait_until,
)

QUEUE = topology.claims_queue("ctx-test")
DECLARES = Declares("if-missing", ("ctx-test",))


def publish(address: BrokerAddress, count: int) -> None:
    with Publisher(address, "test", window=50, declares=DECLARES).open(PATIENCE) as publisher:
        for number in range(count):
            publisher.publish(
                Outgoing(topology.CLAIMS_EXCHANGE, QUEUE, b"%d" % number, message_id=str(number))
            )
        publisher.flush(PATIENCE)


def new_consumer(address: BrokerAddress, prefetch: int) -> Consumer:
    return Consumer(address, "test", queues=[QUEUE], prefetch=prefetch, declares=DECLARES).open(
        PATIENCE
    )


@pytest.fixture
def consumer(address: BrokerAddress) -> Iterator[Consumer]:
    with new_consumer(address, 2) as opened:
        yield opened


def test_no_more_than_the_prefetch_is_taken(
    node: PrivateNode, address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 5)
    first, second = consumer.take(PATIENCE), consumer.take(PATIENCE)
    assert first and second and consumer.take(0.5) is None
    assert messages_in(node, QUEUE) == 3
    consumer.acknowledge([first])
    assert consumer.take(PATIENCE)


def test_what_is_settled_while_we_close_a_connection_is_settled_in_vain_and_comes_again(
    address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 2)
    hand = [consumer.take(PATIENCE), consumer.take(PATIENCE)]
    consumer._call_soon(consumer._restart_connection)  # as when the broker cancelled us
    consumer.set_prefetch(4)
    consumer.acknowledge(delivery for delivery in hand if delivery)
    again = take_all(consumer, 2)
    assert [delivery.redelivered for delivery in again] == [True, True]
    consumer.acknowledge(again)


def test_taking_ends_in_time_whatever_a_signals_handler_takes(
    address: BrokerAddress, consumer: Consumer
) -> None:
    handled: list[int] = []

    def handle(number: int, _: object) -> None:
        time.sleep(0.3)
        handled.append(number)

    before = signal.signal(signal.SIGALRM, handle)
    late = threading.Timer(20, publish, (address, 1))  # ends what would otherwise never end
    late.start()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert consumer.take(0.2) is None
        assert handled == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        late.cancel()
        late.join()


def take_all(consumer: Consumer, least: int = 0) -> list[Delivery]:
    """All that come before it is quiet; `least` of them, however long they take."""
    taken = [consumer.take(PATIENCE) for _ in range(least)]
    assert all(taken)
    while (delivery := consumer.take(0.5)) is not None:
        taken.append(delivery)
    return taken


def test_the_prefetch_can_grow_and_shrink_and_nothing_is_lost_or_comes_twice(
    address: BrokerAddress,
) -> None:
    publish(address, 40)
    with new_consumer(address, 1) as consumer:
        hand = take_all(consumer, 1)
        seen = list(hand)
        for prefetch in (3, 5, 1, 2, 4, 1):
            consumer.set_prefetch(prefetch)
            came = take_all(consumer, max(0, prefetch - len(hand)))
            # What is in hand already stays there: only what is settled makes room.
            assert len(hand + came) == max(len(hand), prefetch)
            hand, seen = hand + came, seen + came
            while hand:  # until all that was taken under another number is settled
                consumer.acknowledge(hand)
                hand = take_all(consumer, min(prefetch, 40 - len(seen)))
                seen += hand
                if len(hand) == prefetch:
                    break
            assert len(hand) == min(prefetch, 40 - len(seen) + len(hand))
        while hand:
            consumer.acknowledge(hand)
            hand = take_all(consumer, min(prefetch, 40 - len(seen)))
            seen += hand
        assert sorted(int(delivery.body) for delivery in seen) == list(range(40))
        assert {(delivery.attempt, delivery.redelivered) for delivery in seen} == {(1, False)}
        assert {delivery.queue for delivery in seen} == {QUEUE}


def test_a_prefetch_that_changes_while_work_goes_on_loses_and_doubles_nothing(
    node: PrivateNode, address: BrokerAddress
) -> None:
    publish(address, 300)
    chance = Random(7)
    with new_consumer(address, 1) as consumer:
        hand: list[Delivery] = []
        seen: list[Delivery] = []
        while len(seen) < 300:
            consumer.set_prefetch(chance.randint(1, 5))
            delivery = consumer.take(0.01 if hand else PATIENCE)
            if delivery is not None:
                hand.append(delivery)
                seen.append(delivery)
            while hand and chance.random() < 0.6:
                consumer.acknowledge([hand.pop(chance.randrange(len(hand)))])
        consumer.acknowledge(hand)
        assert take_all(consumer) == []
    assert sorted(int(delivery.body) for delivery in seen) == list(range(300))
    assert {delivery.attempt for delivery in seen} == {1}
    assert messages_in(node, QUEUE) == 0


def test_a_changed_prefetch_outlives_a_lost_connection(
    node: PrivateNode, address: BrokerAddress
) -> None:
    publish(address, 9)
    with new_consumer(address, 1) as consumer:
        consumer.set_prefetch(4)
        cut(consumer)  # in the midst of the change
        first = consumer.take(PATIENCE)
        wait_for_messages(node, QUEUE, 5, "four taken")
        cut(consumer)
        consumer.set_prefetch(2)  # while there is no connection
        wait_for_messages(node, QUEUE, 7, "two taken")
        assert first and len(take_all(consumer, 2)) == 2


def test_a_prefetch_that_changes_as_the_drain_begins_leaves_nothing_in_our_hands(
    node: PrivateNode, address: BrokerAddress
) -> None:
    publish(address, 50)
    with new_consumer(address, 1) as consumer:
        taken = consumer.take(PATIENCE)
        for prefetch in (5, 2, 4, 1, 3):
            consumer.set_prefetch(prefetch)
        consumer.stop_taking(PATIENCE)
        consumer.set_prefetch(6)
        assert taken and take_all(consumer) == []
        wait_for_messages(node, QUEUE, 49, "all but one given back")
        consumer.acknowledge([taken])
    assert messages_in(node, QUEUE) == 49


def test_nothing_is_forgotten_when_the_node_is_killed_however_much_was_in_hand(
    tmp_path: Path,
) -> None:
    """The node reads its log again, and must come to what it had come to before."""
    with PrivateNode(tmp_path / "node") as node:
        address = BrokerAddress.from_settings(
            load_settings(broker_url=node.url, broker_password=node.password)
        )
        publish(address, 400)
        made = time.monotonic()
        settled: list[Delivery] = []
        with new_consumer(address, 1) as consumer:
            consumer.set_prefetch(200)
            for lost_before in (False, True):
                if lost_before:
                    cut(consumer)
                hand = take_all(consumer, 200)
                assert len(hand) == 200
                for prefetch in (150, 200, 100, 200):  # those that are ended hold what they held
                    consumer.set_prefetch(prefetch)
                    assert take_all(consumer) == []
                settled += hand[::4]
                consumer.acknowledge(hand[::4])
                take_all(consumer, 1)  # in place of those: so their acknowledgements were sent
            let_queues_age(made)
            process = node.process()
            assert process is not None
            process.kill()
            ended(node)
            node.start()
            consumer.set_prefetch(256)
            left: list[Delivery] = []
            while len(left) < 300:
                came = take_all(consumer, 1)
                left += came
                consumer.acknowledge(came)
            assert take_all(consumer) == []
        numbers = {int(delivery.body) for delivery in settled}
        assert len(numbers) == 100
        assert {int(delivery.body) for delivery in left} == set(range(400)) - numbers


def test_heartbeats_go_on_while_a_batch_takes_long(
    address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 1)
    delivery = consumer.take(PATIENCE)
    assert delivery
    time.sleep(16)  # over three heartbeats of 5 s: the broker would have hung up
    assert consumer.connected
    consumer.acknowledge([delivery])
    consumer.close()
    with new_consumer(address, 1) as again:
        assert again.take(0.5) is None


def test_what_is_given_back_comes_again_with_its_attempt_counted(
    address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 1)
    for attempt in range(1, 30):  # more often than the delivery limit of RabbitMQ 4
        delivery = consumer.take(PATIENCE)
        assert delivery and delivery.attempt == attempt
        consumer.give_back([delivery])


def test_what_is_refused_lands_among_the_dead_messages(
    node: PrivateNode, address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 1)
    delivery = consumer.take(PATIENCE)
    assert delivery
    with Publisher(address, "test", window=1).open(PATIENCE) as publisher:
        publisher.publish(
            delivery.as_dead_message("it says nothing", lambda: consumer.acknowledge([delivery]))
        )
        publisher.flush(PATIENCE)
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 1, "a dead message")


def test_stop_taking_gives_back_what_nobody_took_and_lets_the_rest_be_settled(
    node: PrivateNode, address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 4)
    taken = consumer.take(PATIENCE)
    assert taken
    consumer.stop_taking(PATIENCE)
    wait_for_messages(node, QUEUE, 3, "three messages given back")
    consumer.acknowledge([taken])
    consumer.close()
    assert messages_in(node, QUEUE) == 3


def test_a_consumer_that_dies_loses_nothing(node: PrivateNode, address: BrokerAddress) -> None:
    publish(address, 2)
    dying = new_consumer(address, 2)
    assert dying.take(PATIENCE) and dying.take(PATIENCE)
    cut(dying)
    with new_consumer(address, 2) as heir:
        # Either may have connected first; what the dying one took again is given back now.
        dying.close()
        bodies = set()
        while bodies != {b"0", b"1"}:
            delivery = heir.take(PATIENCE)
            assert delivery and delivery.redelivered
            bodies.add(delivery.body)


def test_an_acknowledgement_from_before_a_lost_connection_is_void(
    address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 1)
    before = consumer.take(PATIENCE)
    assert before
    cut(consumer)
    after = consumer.take(PATIENCE)
    assert after and after.body == before.body and after.redelivered
    consumer.acknowledge([before])  # has the same tag as `after`: must not acknowledge it
    consumer.give_back([after])
    assert consumer.take(PATIENCE)


def test_a_link_that_finds_the_broker_ends_the_wait_of_the_others(
    address: BrokerAddress, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Publisher(address, "test", window=1, declares=DECLARES).open(PATIENCE) as publisher:
        monkeypatch.setattr(link, "_FIRST_DELAY_SECONDS", 600.0)
        monkeypatch.setattr(link, "_LONGEST_DELAY_SECONDS", 600.0)
        cut(consumer)
        wait_until(lambda: consumer in link._waiting, "the consumer, waiting")
        monkeypatch.setattr(link, "_FIRST_DELAY_SECONDS", 0.1)
        cut(publisher)
        wait_until(lambda: publisher.connected and consumer.connected, "both, connected")
        assert not link._waiting


def test_a_deleted_queue_is_declared_again(
    node: PrivateNode, address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 1)
    delivery = consumer.take(PATIENCE)
    assert delivery
    consumer.acknowledge([delivery])
    before = consumer._epoch
    delete_queues(node, QUEUE)
    # RabbitMQ 3.10 does not tell the consumer when the queue is there again within milliseconds.
    wait_until(lambda: consumer._epoch > before + 1, "a new channel")
    publish(address, 1)
    assert consumer.take(PATIENCE)


def test_whoever_takes_can_ask_how_long_queues_are_and_goes_on_taking(
    node: PrivateNode, address: BrokerAddress, consumer: Consumer
) -> None:
    publish(address, 5)
    taken = [consumer.take(PATIENCE), consumer.take(PATIENCE)]
    answers: list[Counts] = []
    # Where a queue is missing, the broker closes the channel that asked.
    consumer.request_counts(["claims.no-such", QUEUE, "claims.nor-such"], answers.append)
    wait_until(lambda: answers, "an answer")
    assert answers == [{QUEUE: 3}]
    consumer.acknowledge(delivery for delivery in taken if delivery)
    assert consumer.take(PATIENCE)
    consumer.request_counts(["claims.no-such"], answers.append)
    wait_until(lambda: len(answers) == 2, "a second answer")
    assert answers[1] == {}


def test_a_question_that_a_lost_connection_swallows_can_be_asked_again(
    address: BrokerAddress, consumer: Consumer
) -> None:
    answers: list[Counts] = []
    consumer.request_counts([QUEUE] * 50, answers.append)
    cut(consumer)

    def answered() -> list[Counts]:
        consumer.request_counts([QUEUE], answers.append)
        return answers

    wait_until(answered, "an answer")
    assert answers[-1][QUEUE] == 0
