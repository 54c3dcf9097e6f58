"""How batches are processed. Taking and draining is tested with a real broker."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from services.broker import Delivery
from services.contexts.engine_client import Answer, EngineSilent, Interrupted
from services.contexts.lease import EngineLease
from services.contexts.plan import EnginePlan
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextSpec,
    ControlUpdate,
    DeadClaim,
    DeadReason,
    Label,
    PromptSpec,
    Run,
    Settings,
    VerdictBatch,
    decode,
    encode,
    load_settings,
    topology,
)
from services.contracts.errors import (
    BrokerRefused,
    EngineRequestError,
    EngineStartError,
    MessageTooNew,
)
from services.gpu_worker.concurrency import AdaptiveConcurrency
from services.gpu_worker.crashes import CrashRecords
from services.gpu_worker.device_time import DeviceTime
from services.gpu_worker.fault_isolation import FaultIsolation, prompt_key
from services.gpu_worker.heartbeat import ControlState
from services.gpu_worker.in_flight import InFlightBatch, WorkerIdentity
from services.gpu_worker.inference import Inference
from services.gpu_worker.session import BatchProcessor
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from tests.unit.gpu_worker.conftest import DEVICE, RecordingBroker, delivered, died_asking

UNUSABLE = PromptSpec(labels=(Label(name="A", word="True"), Label(name="B", word="True")))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(runtime_dir=tmp_path / "run")


@pytest.fixture
def engine(spec: ContextSpec, settings: Settings) -> EngineLease:
    return EngineLease(EnginePlan.of(spec, DEVICE, settings), settings)


@pytest.fixture
def processor(
    spec: ContextSpec,
    settings: Settings,
    engine: EngineLease,
    broker: RecordingBroker,
    crashes: CrashRecords,
) -> BatchProcessor:
    tokenizer = ModelTokenizer.load(spec)
    inference = Inference(
        tokenizer,
        engine.client,
        max_model_tokens=spec.max_model_tokens,
        engine_max_tokens=lambda: engine.max_model_tokens,
    )
    return BatchProcessor(
        context_id=spec.context_id,
        inference=inference,
        fault_isolation=FaultIsolation(engine, inference, settings, threading.Event(), crashes),
        concurrency=AdaptiveConcurrency(settings.prefetch_seconds, settings.batches_in_flight),
        consumer=broker,  # type: ignore[arg-type]
        publisher=broker,  # type: ignore[arg-type]
        identity=WorkerIdentity("worker-1", DEVICE.name),
        control=ControlState(),
        crashes=crashes,
        device_time=DeviceTime(DEVICE.name),
        on_answer=lambda: None,
        engine_name="node-1/engine-1",
        other_engine_seconds=300,
    )


def answer(tokens: list[int]) -> Answer:
    return Answer("True", tuple(-1.0 - n for n in range(len(tokens))))


Answers = Callable[[int, Exception | None], None]


@pytest.fixture
def engine_answers(engine: EngineLease, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """`engine_answers(2, error)`: the engine answers the first two prompts and fails then."""

    def set_up(answers: int, failure: Exception | None = None) -> None:
        def score(prompts: list[list[int]], tokens: list[int]) -> Iterator[tuple[int, Answer]]:
            for index in range(min(answers, len(prompts))):
                yield index, answer(tokens)
            if failure is not None:
                raise failure

        monkeypatch.setattr(engine.client, "score", score)

    return set_up


def batch_of(spec: ContextSpec, prompt: PromptSpec | None = None, claims: int = 3) -> ClaimBatch:
    return ClaimBatch(
        run=Run(source="f", source_digest="d", context=spec, prompt=prompt or PromptSpec()),
        submission_id="sub-1",
        batch_id="00000000-0",
        claims=tuple(
            Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.") for n in range(claims)
        ),
    )


def verdicts_in(broker: RecordingBroker) -> list[str]:
    batches = [decode(VerdictBatch, m.body) for m in broker.to(topology.VERDICTS_QUEUE)]
    return [verdict.claim_id for batch in batches for verdict in batch.verdicts]


def returned_in(broker: RecordingBroker) -> list[str]:
    batches = [decode(ClaimBatch, m.body) for m in broker.to(topology.RETURNS_QUEUE)]
    return [claim.claim_id for batch in batches for claim in batch.claims]


def test_each_answer_counts_as_it_comes(
    processor: BatchProcessor,
    spec: ContextSpec,
    engine: EngineLease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def score(prompts: list[list[int]], tokens: list[int]) -> Iterator[tuple[int, Answer]]:
        for index in range(len(prompts)):
            yield index, answer(tokens)
            seen.append("answered")

    monkeypatch.setattr(engine.client, "score", score)
    counting = replace(processor, on_answer=lambda: seen.append("counted"))
    counting.process([delivered(batch_of(spec))])
    assert seen == ["counted", "answered"] * 3


# Label words that the model does not answer with.


def test_a_worker_warns_once_a_run_that_the_model_rarely_answers_with_a_label_word(
    processor: BatchProcessor,
    spec: ContextSpec,
    engine: EngineLease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score(prompts: list[list[int]], tokens: list[int]) -> Iterator[tuple[int, Answer]]:
        for index in range(len(prompts)):
            yield index, Answer("<think>", (-6.0,) * len(tokens))

    monkeypatch.setattr(engine.client, "score", score)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            processor.process([delivered(batch_of(spec))])
    warned = [entry for entry in logs if entry["event"] == "labels.unlikely"]
    assert [entry["model_says"] for entry in warned] == ["<think>"]
    assert warned[0]["median_mass"] < 0.01


# Unusable messages.


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"body": b""}, "not a ClaimBatch: Invalid JSON"),
        ({"body": b"nonsense"}, "not a ClaimBatch: Invalid JSON"),
        ({"body": b"{}"}, "not a ClaimBatch: run: Field required"),
        ({"kind": "DeadClaim"}, "its type is 'DeadClaim', not ClaimBatch"),
        ({"content_type": ""}, "its content type is '', not application/json"),
        ({"headers": {topology.FAILURES_HEADER: None}}, "keepwarm-failures is not a valid count"),
    ],
)
def test_an_unusable_message_is_dead_lettered_with_the_reason_and_then_acknowledged(
    changes: dict[str, object],
    why: str,
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
) -> None:
    delivery = delivered(batch_of(spec), **changes)
    processor.process([delivery])
    (message,) = broker.messages
    assert message.routing_key == topology.DEAD_MESSAGES_QUEUE
    assert (message.body, message.message_id) == (delivery.body, "m-1")
    assert why in message.headers[topology.REASON_HEADER]
    assert message.headers[topology.ORIGIN_HEADER] == delivery.queue
    assert broker.settled == []
    broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]


def test_a_batch_for_another_context_is_dead_lettered(
    processor: BatchProcessor, broker: RecordingBroker
) -> None:
    other = batch_of(ContextSpec(model="org/other"))
    processor.process([delivered(other)])
    (message,) = broker.messages
    assert message.routing_key == topology.DEAD_MESSAGES_QUEUE
    assert "the batch's context is not its queue's" in message.headers[topology.REASON_HEADER]


# A batch that is answered.


def test_a_batch_is_answered_and_acknowledged_once_its_verdicts_are_confirmed(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(3)
    processor.process([delivered(batch_of(spec), earlier=2)])
    (message,) = broker.messages
    batch = decode(VerdictBatch, message.body)
    assert verdicts_in(broker) == ["c0", "c1", "c2"]
    assert (batch.device, batch.attempt) == ("Xeon", 3)
    assert broker.settled == []
    broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]
    assert processor.quarantined == []


def test_dead_claims_go_to_their_queue_and_the_batch_is_acknowledged_after_the_last(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    batch = batch_of(spec, UNUSABLE)
    processor.process([delivered(batch, earlier=4)])
    dead = [decode(DeadClaim, m.body) for m in broker.to(topology.DEAD_CLAIMS_QUEUE)]
    assert [each.claim for each in dead] == list(batch.claims)
    assert {each.reason for each in dead} == {DeadReason.PROMPT_UNUSABLE}
    assert {each.attempt for each in dead} == {5}
    assert len({message.message_id for message in broker.messages}) == 3
    for message in broker.messages:
        assert broker.settled == []
        broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]


# Small batches that share a request.


class Requests(list[int]):
    """How many prompts each request had. The engine answers all but those in `unanswered`."""

    unanswered: frozenset[int] = frozenset()

    def score(self, prompts: list[list[int]], tokens: list[int]) -> Iterator[tuple[int, Answer]]:
        self.append(len(prompts))
        for index in range(len(prompts)):
            if index not in self.unanswered:
                yield index, answer(tokens)


@pytest.fixture
def requests(engine: EngineLease, monkeypatch: pytest.MonkeyPatch) -> Requests:
    made = Requests()
    monkeypatch.setattr(engine.client, "score", made.score)
    return made


def tagged(*batches: ClaimBatch) -> list[Delivery]:
    """Each with a tag and claims of its own."""
    return [
        delivered(
            batch.model_copy(
                update={
                    "batch_id": f"0000000{tag}-0",
                    "claims": tuple(
                        claim.model_copy(update={"claim_id": f"{tag}-{claim.claim_id}"})
                        for claim in batch.claims
                    ),
                }
            ),
            tag=tag,
        )
        for tag, batch in enumerate(batches)
    ]


def test_small_batches_are_one_request_and_each_is_settled_by_itself(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, requests: Requests
) -> None:
    sizes = [batch_of(spec, claims=claims) for claims in (2, 1, 3)]
    processor.process(tagged(*sizes))
    assert requests == [6]
    assert verdicts_in(broker) == ["0-c0", "0-c1", "1-c0", "2-c0", "2-c1", "2-c2"]
    for message, tag in zip(broker.messages, range(3), strict=True):
        broker.confirm(message)
        assert broker.settled[tag:] == [("acknowledged", tag)]


def test_of_batches_that_have_become_larger_those_over_the_claim_limit_are_returned(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, requests: Requests
) -> None:
    assert processor.concurrency.claim_limit == 64  # until the speed is known
    sizes = [batch_of(spec, claims=claims) for claims in (1, 60, 60, 60)]
    processor.process(tagged(*sizes))
    assert requests == [61]
    assert broker.settled == [("given back", 2), ("given back", 3)]
    assert {batch.delivery.tag for batch in processor.in_flight} <= {0, 1}


def test_batches_with_different_prompts_are_requests_of_their_own(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, requests: Requests
) -> None:
    other = PromptSpec(name="other", instructions="Judge.")
    processor.process(tagged(batch_of(spec), batch_of(spec), batch_of(spec, other)))
    assert requests == [6, 3]
    assert len(verdicts_in(broker)) == 9


def test_of_batches_in_one_request_only_those_without_an_answer_are_quarantined(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, requests: Requests
) -> None:
    requests.unanswered = frozenset({4})
    processor.process(tagged(*[batch_of(spec)] * 3))
    (batch,) = processor.quarantined
    assert (batch.delivery.tag, batch.unresolved) == (1, {1: 1})
    assert [name[0] for name in verdicts_in(broker)] == ["0"] * 3 + ["2"] * 3


def test_an_unusable_message_does_not_stop_the_batches_that_came_with_it(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, requests: Requests
) -> None:
    first, second, third = tagged(*[batch_of(spec)] * 3)
    processor.process([first, replace(second, body=b"nonsense"), third])
    assert requests == [6]
    assert len(broker.to(topology.DEAD_MESSAGES_QUEUE)) == 1


class Inbox:
    """A consumer whose messages are there already."""

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self._deliveries = list(deliveries)
        self.waits: list[float] = []

    def take(self, timeout_seconds: float) -> Delivery | None:
        self.waits.append(timeout_seconds)
        return self._deliveries.pop(0) if self._deliveries else None


def take(processor: BatchProcessor, inbox: Inbox, *, linger: bool) -> list[int]:
    processor = replace(processor, consumer=inbox)  # type: ignore[arg-type]
    return [one.tag for one in processor.take(0.2, linger=linger)]


def test_as_many_small_batches_are_taken_as_make_a_request(
    processor: BatchProcessor, spec: ContextSpec
) -> None:
    inbox = Inbox(tagged(*[batch_of(spec, claims=8)] * 7))
    assert take(processor, inbox, linger=True) == [0]  # their size is not known yet
    processor.concurrency.accept(8)
    assert take(processor, inbox, linger=True) == [1, 2]  # of the 8 that may be in flight
    assert take(processor, Inbox([]), linger=True) == []


def test_small_batches_wait_for_others_only_while_the_engine_has_work(
    processor: BatchProcessor, spec: ContextSpec
) -> None:
    processor.concurrency.accept(1)
    busy, idle = Inbox(tagged(batch_of(spec))), Inbox(tagged(batch_of(spec)))
    assert take(processor, busy, linger=True) == take(processor, idle, linger=False) == [0]
    assert busy.waits[1] > 0 and idle.waits[1] == 0


# A batch that is larger than the claim limit.


def test_the_first_batch_is_trimmed_to_what_any_engine_can_finish_and_the_rest_is_returned(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(200)
    processor.process([delivered(batch_of(spec, claims=200))])
    ids = [f"c{n}" for n in range(200)]
    assert (verdicts_in(broker), returned_in(broker)) == (ids[:64], ids[64:])
    for message in broker.messages:
        assert broker.settled == []
        broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]


def test_an_engine_that_turns_out_fast_gets_as_many_batches_as_it_may_have(
    processor: BatchProcessor,
    settings: Settings,
    spec: ContextSpec,
    broker: RecordingBroker,
    engine_answers: Answers,
) -> None:
    tick = itertools.count()
    concurrency = AdaptiveConcurrency(
        settings.prefetch_seconds, settings.batches_in_flight, clock=lambda: next(tick) / 1000
    )
    processor = replace(processor, concurrency=concurrency)
    engine_answers(64)
    processor.process([delivered(batch_of(spec, claims=64))])
    assert broker.prefetch == settings.batches_in_flight
    processor.process([delivered(batch_of(spec, claims=200))])
    assert returned_in(broker) == []


def test_a_batch_that_an_engine_failed_with_elsewhere_is_not_trimmed(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    processor.process([delivered(batch_of(spec, claims=200), failures=1)])
    assert broker.messages == [] and len(processor.quarantined[0].unresolved) == 200


# A batch that the engine fails with.


@pytest.mark.parametrize("answers", [0, 2])
@pytest.mark.parametrize("failure", [EngineRequestError("gone"), EngineSilent("hangs"), None])
def test_a_batch_that_the_engine_fails_with_is_quarantined_and_not_settled_yet(
    failure: Exception | None,
    answers: int,
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
    engine_answers: Answers,
) -> None:
    engine_answers(answers, failure)
    processor.process([delivered(batch_of(spec))])
    assert (broker.messages, broker.settled) == ([], [])
    (batch,) = processor.quarantined
    assert batch.unresolved == dict.fromkeys(range(answers, 3), 1)


def test_a_batch_for_an_engine_that_is_not_there_is_quarantined(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    processor.process([delivered(batch_of(spec))])
    assert (broker.messages, broker.settled, len(processor.quarantined)) == ([], [], 1)


def test_a_batch_that_an_engine_failed_with_elsewhere_is_quarantined_at_once(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(3)
    processor.process([delivered(batch_of(spec), failures=1)])
    assert (broker.messages, broker.settled, len(processor.quarantined)) == ([], [], 1)


# A batch that our own code fails with.


def failing_with(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our code raises whenever it encodes this claim."""
    encode = CompiledPrompt.encode

    def fails(prompt: CompiledPrompt, claims: Sequence[Claim]) -> list[list[int]]:
        if claim_id in [claim.claim_id for claim in claims]:
            raise RuntimeError(claim_id)
        return encode(prompt, claims)

    monkeypatch.setattr(CompiledPrompt, "encode", fails)


def test_a_batch_that_our_code_fails_with_is_quarantined_and_the_worker_continues(
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
    engine_answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_answers(3)
    failing_with("c1", monkeypatch)
    processor.process([delivered(batch_of(spec))])
    (batch,) = processor.quarantined
    assert (broker.messages, batch.unresolved) == ([], dict.fromkeys(range(3), 1))
    monkeypatch.setattr(EngineLease, "alive", True)
    processor.isolate_next()
    assert verdicts_in(broker) == ["c0", "c2"]
    (dead,) = broker.to(topology.DEAD_CLAIMS_QUEUE)
    assert decode(DeadClaim, dead.body).reason is DeadReason.WORKER_FAILED


def let_settlements_fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(InFlightBatch, "settle", fails)


def test_a_batch_whose_settlement_fails_is_dead_lettered_with_the_reason_and_no_claim_is_logged(
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
    engine_answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_answers(3)
    let_settlements_fail(monkeypatch, RuntimeError("Claim 1."))
    with structlog.testing.capture_logs() as logs:
        processor.process([delivered(batch_of(spec))])
    (message,) = broker.messages
    assert message.routing_key == topology.DEAD_MESSAGES_QUEUE
    assert "the worker failed with it: RuntimeError" in message.headers[topology.REASON_HEADER]
    assert "Claim 1." not in str(logs) and "RuntimeError in" in str(logs)
    broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]
    assert not processor.in_flight


@pytest.mark.parametrize("error", [BrokerRefused, EngineStartError])
def test_what_ends_a_worker_is_no_fault_of_a_batch(
    error: type[Exception],
    processor: BatchProcessor,
    spec: ContextSpec,
    engine_answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_answers(3)
    let_settlements_fail(monkeypatch, error("no"))
    with pytest.raises(error):
        processor.process([delivered(batch_of(spec))])


def test_while_a_batch_is_asked_about_its_claims_are_on_disk(
    processor: BatchProcessor,
    spec: ContextSpec,
    engine: EngineLease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[object]] = []
    records = processor.crashes._own_dir

    def score(prompts: list[list[int]], tokens: list[int]) -> Iterator[tuple[int, Answer]]:
        seen.append([json.loads(path.read_text())["keys"] for path in records.glob("*.json")])
        for index in range(len(prompts)):
            yield index, answer(tokens)

    monkeypatch.setattr(engine.client, "score", score)
    batch = batch_of(spec)
    processor.process([delivered(batch)])
    assert seen == [[[[batch.run.run_id, f"c{n}"] for n in range(3)]]]
    assert not list(records.glob("*.json"))


def test_a_batch_that_a_worker_of_this_node_crashed_with_is_quarantined_until_it_is_settled(
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
    engine_answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    engine_answers(3)
    batch = batch_of(spec)
    keys = [(batch.run.run_id, f"c{n}") for n in range(3)]
    left = died_asking(tmp_path / "node", "dead", keys)
    (left / "fatal.log").write_text("Fatal Python error: Segmentation fault")
    processor.process([delivered(batch, earlier=1)])
    (batch,) = processor.quarantined
    assert batch.unresolved == dict.fromkeys(range(3), 1)
    monkeypatch.setattr(EngineLease, "alive", True)
    processor.isolate_next()
    assert verdicts_in(broker) == ["c0", "c1", "c2"]
    assert not list((tmp_path / "node" / "crashed").iterdir())


def test_a_batch_that_was_delivered_very_often_is_returned_claim_by_claim(
    processor: BatchProcessor, broker: RecordingBroker, batch: ClaimBatch, spec: ContextSpec
) -> None:
    processor.process([delivered(batch_of(spec), earlier=20)])
    assert returned_in(broker) == ["c0", "c1", "c2"]
    messages = broker.to(topology.RETURNS_QUEUE)
    assert [message.headers[topology.FAILURES_HEADER] for message in messages] == [1, 1, 1]
    assert (broker.settled, processor.in_flight, processor.quarantined) == ([], set(), [])
    for message in messages:
        broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]


def test_a_claim_that_is_delivered_alone_again_goes_to_the_end_of_the_queue_first(
    processor: BatchProcessor, broker: RecordingBroker, spec: ContextSpec
) -> None:
    one = batch_of(spec, claims=1)
    processor.process([delivered(one, earlier=1, failures=2)])
    (message,) = broker.to(topology.RETURNS_QUEUE)
    assert message.headers[topology.FAILURES_HEADER] == 2
    assert processor.quarantined == []
    processor.process([delivered(one, failures=2)])  # as it comes back
    assert len(processor.quarantined) == 1


def test_every_batch_with_a_prompt_that_crashed_workers_of_this_node_is_quarantined(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, tmp_path: Path
) -> None:
    batch = batch_of(spec)
    left = died_asking(tmp_path / "node", "dead", [prompt_key(batch.run.prompt)], alone=True)
    (left / "fatal.log").write_text("Fatal Python error: Segmentation fault")
    processor.crashes.collect()
    processor.process([delivered(batch)])
    assert len(processor.quarantined) == 1 and broker.messages == []


# Claims that our engine declines.


@pytest.fixture
def short(engine: EngineLease) -> None:
    """An engine that takes fewer tokens than the context has."""
    engine.max_model_tokens = 16


def declined_by(engine: str, batch: ClaimBatch, waited: int = 0) -> Delivery:
    headers = {topology.DECLINED_HEADER: [f"unable {engine}"], topology.WAITED_HEADER: waited}
    return delivered(batch, headers=headers)


@pytest.mark.usefixtures("short")
def test_claims_too_long_for_our_engine_are_returned_at_once_and_logged_once_a_run(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            processor.process([delivered(batch_of(spec))])
    assert processor.quarantined == [] and broker.to(topology.DEAD_CLAIMS_QUEUE) == []
    returned = broker.to(topology.RETURNS_QUEUE)
    assert returned_in(broker) == ["c0", "c1", "c2"] * 3
    assert returned[0].headers[topology.DECLINED_HEADER] == ["unable node-1/engine-1"]
    (event,) = [entry for entry in logs if entry["event"] == "claims.declined"]
    assert (event["claims"], event["reason"]) == (3, "too-long")
    assert "this engine accepts only 15" in event["detail"] and "within 300 s" in event["next_step"]


@pytest.mark.usefixtures("short")
def test_claims_that_our_engine_declined_before_are_delayed_and_then_returned(
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("services.gpu_worker.session.time.monotonic", lambda: now)
    processor.process([declined_by("node-1/engine-1", batch_of(spec), waited=290)])
    processor.return_delayed()
    assert (broker.messages, broker.settled, len(processor.delayed)) == ([], [], 1)
    now += 5
    processor.return_delayed()
    (message,) = broker.to(topology.RETURNS_QUEUE)
    assert message.headers[topology.WAITED_HEADER] == 295
    assert not processor.delayed and not processor.in_flight


@pytest.mark.usefixtures("short")
def test_claims_that_no_other_engine_answered_in_time_are_dead_so_that_the_run_ends(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    processor.process([declined_by("node-1/engine-1", batch_of(spec), waited=300)])
    dead = [decode(DeadClaim, m.body) for m in broker.to(topology.DEAD_CLAIMS_QUEUE)]
    assert [each.claim.claim_id for each in dead] == ["c0", "c1", "c2"]
    assert {each.reason for each in dead} == {DeadReason.TOO_LONG}
    assert "correct" in dead[0].detail.lower() and "Tried: node-1/engine-1." in dead[0].detail


def test_what_another_engine_could_not_answer_is_answered_here_at_once(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(3)
    processor.process([declined_by("node-2/engine-2", batch_of(spec))])
    assert verdicts_in(broker) == ["c0", "c1", "c2"]


# An interrupted batch.


@pytest.mark.parametrize("answers", [1, 2])
def test_an_interrupted_batch_keeps_its_verdicts_and_the_rest_is_returned_without_a_failure(
    answers: int,
    processor: BatchProcessor,
    spec: ContextSpec,
    broker: RecordingBroker,
    engine_answers: Answers,
) -> None:
    engine_answers(answers, Interrupted("interrupted"))
    processor.process([delivered(batch_of(spec))])
    ids = ["c0", "c1", "c2"]
    assert (verdicts_in(broker), returned_in(broker)) == (ids[:answers], ids[answers:])
    (rest,) = broker.to(topology.RETURNS_QUEUE)
    assert rest.headers == {topology.FAILURES_HEADER: 0}
    assert processor.quarantined == []


def test_a_batch_that_is_interrupted_before_the_first_answer_is_returned_whole(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(0, Interrupted("interrupted"))
    processor.process([delivered(batch_of(spec))])
    assert (broker.messages, broker.settled) == ([], [("given back", 7)])


# A cancelled batch.


def test_a_cancelled_batch_is_dropped_unanswered_and_others_are_not(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(3)
    processor.control.receive(encode(ControlUpdate(cancelled=("sub-0", "sub-1"))))
    processor.process([delivered(batch_of(spec))])
    assert (broker.messages, broker.settled) == ([], [("acknowledged", 7)])
    wanted = batch_of(spec).model_copy(update={"submission_id": "sub-2"})
    processor.process([delivered(wanted)])
    assert verdicts_in(broker) == ["c0", "c1", "c2"]


def test_a_cancelled_batch_that_failed_before_is_dropped_as_well(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    processor.control.receive(encode(ControlUpdate(cancelled=("sub-1",))))
    processor.process([delivered(batch_of(spec), failures=2)])
    assert (broker.settled, processor.quarantined) == ([("acknowledged", 7)], [])


def test_the_latest_control_update_replaces_the_previous_one(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(3)
    processor.control.receive(encode(ControlUpdate(cancelled=("sub-1",))))
    processor.control.receive(encode(ControlUpdate()))
    processor.process([delivered(batch_of(spec))])
    assert verdicts_in(broker) == ["c0", "c1", "c2"]


@pytest.mark.parametrize("body", [b"", b"{}x", b'{"cancelled": [""]}', b'{"schema_version": 99}'])
def test_an_unusable_control_update_changes_nothing(
    body: bytes, processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker
) -> None:
    processor.control.receive(encode(ControlUpdate(cancelled=("sub-1",))))
    processor.control.receive(body)
    processor.process([delivered(batch_of(spec))])
    assert broker.settled == [("acknowledged", 7)]


def test_a_batch_that_is_newer_is_given_back_once_the_others_are_settled_and_nothing_more_comes(
    processor: BatchProcessor, spec: ContextSpec, broker: RecordingBroker, engine_answers: Answers
) -> None:
    engine_answers(3)
    newer = delivered(batch_of(spec))
    newer = replace(
        newer, tag=8, body=newer.body.replace(b'"schema_version":1', b'"schema_version":99')
    )
    with pytest.raises(MessageTooNew, match="a ClaimBatch of version 99 came"):
        processor.process([newer, delivered(batch_of(spec))])
    assert verdicts_in(broker) == ["c0", "c1", "c2"]
    assert broker.settled == [("stopped taking", 0), ("given back", 8)]
    assert broker.to(topology.DEAD_MESSAGES_QUEUE) == []
