"""What a worker does with one batch; that it takes and drains batches is shown on a real broker."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from services.broker import Delivery, Outgoing
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextSpec,
    DeadClaim,
    DeadReason,
    Label,
    PromptSpec,
    Run,
    decode,
    encode,
    load_settings,
    topology,
)
from services.contracts.errors import ModelError
from services.gpu_worker import Device, Worker
from services.gpu_worker.worker import _Job

UNUSABLE = PromptSpec(labels=(Label(name="A", word="True"), Label(name="B", word="True")))


class RecordingConsumer:
    def __init__(self) -> None:
        self.settled: list[tuple[str, int]] = []

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("acknowledged", delivery.tag) for delivery in deliveries]

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("given back", delivery.tag) for delivery in deliveries]

    def refuse(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("refused", delivery.tag) for delivery in deliveries]


class RecordingPublisher:
    """Confirms when the test says so."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []

    def publish(self, message: Outgoing) -> None:
        self.messages.append(message)

    def confirm(self, message: Outgoing) -> None:
        assert message.on_confirmed is not None
        message.on_confirmed()


@pytest.fixture
def spec(model_dir: Path) -> ContextSpec:
    return ContextSpec(model=str(model_dir))


@pytest.fixture
def worker(spec: ContextSpec, tmp_path: Path) -> Iterator[Worker]:
    settings = load_settings(runtime_dir=tmp_path / "run")
    made = Worker(spec, Device("cpu", "Xeon", 2**34, (0,)), settings)
    made.stop()  # no pause after a failure
    yield made
    made._engine.close()


@pytest.fixture
def consumer() -> RecordingConsumer:
    return RecordingConsumer()


@pytest.fixture
def publisher() -> RecordingPublisher:
    return RecordingPublisher()


def batch_of(spec: ContextSpec, prompt: PromptSpec, claims: int = 3) -> ClaimBatch:
    return ClaimBatch(
        run=Run(source="f", source_digest="d", context=spec, prompt=prompt),
        batch_id="00000000-0",
        claims=tuple(
            Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.") for n in range(claims)
        ),
    )


def delivery(body: bytes, earlier: int = 0) -> Delivery:
    headers = {"x-delivery-count": earlier}
    return Delivery("claims.x", body, headers, "m", redelivered=False, tag=7, epoch=1)


def see_through(
    worker: Worker, job: _Job, consumer: RecordingConsumer, publisher: RecordingPublisher
) -> None:
    worker._see_through(job, consumer, publisher)  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [b"", b"nonsense", b"{}"])
def test_what_is_no_batch_is_refused(
    body: bytes, worker: Worker, consumer: RecordingConsumer, publisher: RecordingPublisher
) -> None:
    see_through(worker, _Job(delivery(body)), consumer, publisher)
    assert consumer.settled == [("refused", 7)]
    assert publisher.messages == []


def test_a_batch_for_another_context_is_refused(
    worker: Worker, consumer: RecordingConsumer, publisher: RecordingPublisher
) -> None:
    other = batch_of(ContextSpec(model="org/other"), PromptSpec())
    see_through(worker, _Job(delivery(encode(other))), consumer, publisher)
    assert consumer.settled == [("refused", 7)]


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_when_the_engine_does_not_answer_the_batch_is_given_back_unharmed(
    worker: Worker,
    spec: ContextSpec,
    consumer: RecordingConsumer,
    publisher: RecordingPublisher,
) -> None:
    batch = batch_of(spec, PromptSpec())
    see_through(worker, _Job(delivery(encode(batch))), consumer, publisher)
    assert consumer.settled == [("given back", 7)]
    assert publisher.messages == []


def test_a_batch_is_acknowledged_after_the_last_of_its_outcomes_is_confirmed(
    worker: Worker,
    spec: ContextSpec,
    consumer: RecordingConsumer,
    publisher: RecordingPublisher,
) -> None:
    batch = batch_of(spec, UNUSABLE)
    see_through(worker, _Job(delivery(encode(batch), earlier=4)), consumer, publisher)
    assert len(publisher.messages) == 3
    for message in publisher.messages:
        assert consumer.settled == []
        publisher.confirm(message)
    assert consumer.settled == [("acknowledged", 7)]


def test_dead_claims_go_to_their_queue_with_their_reason_and_attempt(
    worker: Worker,
    spec: ContextSpec,
    consumer: RecordingConsumer,
    publisher: RecordingPublisher,
) -> None:
    batch = batch_of(spec, UNUSABLE)
    see_through(worker, _Job(delivery(encode(batch), earlier=4)), consumer, publisher)
    dead = [decode(DeadClaim, message.body) for message in publisher.messages]
    assert [each.claim for each in dead] == list(batch.claims)
    for each, message in zip(dead, publisher.messages, strict=True):
        assert (each.run_id, each.attempt) == (batch.run.run_id, 5)
        assert each.reason is DeadReason.PROMPT_UNUSABLE
        assert each.worker_id == worker.worker_id
        assert (message.exchange, message.routing_key) == (
            topology.DEAD_EXCHANGE,
            topology.DEAD_CLAIMS_QUEUE,
        )
    assert len({message.message_id for message in publisher.messages}) == 3


@pytest.mark.parametrize("usable", [True, False])
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_batch_that_was_given_back_meanwhile_is_neither_published_nor_settled_again(
    usable: bool,
    worker: Worker,
    spec: ContextSpec,
    consumer: RecordingConsumer,
    publisher: RecordingPublisher,
) -> None:
    job = _Job(delivery(encode(batch_of(spec, PromptSpec() if usable else UNUSABLE))))
    assert job.ends()
    see_through(worker, job, consumer, publisher)
    assert consumer.settled == []
    assert publisher.messages == []


def test_only_one_may_settle_a_job() -> None:
    job = _Job(delivery(b""))
    assert [job.ends(), job.ends(), job.ends()] == [True, False, False]


def test_a_model_that_cannot_be_used_is_told_before_anything_is_started(
    spec: ContextSpec, model_dir: Path, tmp_path: Path
) -> None:
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Worker(spec, Device("cpu", "Xeon", 2**34, (0,)), load_settings(runtime_dir=tmp_path / "r"))


def test_two_workers_have_two_names(spec: ContextSpec, tmp_path: Path) -> None:
    settings = load_settings(runtime_dir=tmp_path / "run")
    workers = [Worker(spec, Device("cpu", "Xeon", 2**34, (0,)), settings) for _ in range(2)]
    assert workers[0].worker_id != workers[1].worker_id
    for worker in workers:
        worker._engine.close()
