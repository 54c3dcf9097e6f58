"""Whatever happens to a batch, the messages that settle it account for each of its claims once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.broker import Outgoing
from services.contracts import (
    Claim,
    ClaimBatch,
    DeadClaim,
    DeadReason,
    Run,
    VerdictBatch,
    decode,
    topology,
)
from services.contracts.bounds import (
    MAX_CLAIM_CHARS,
    MAX_DETAIL_CHARS,
    MAX_EVIDENCE_CHARS,
    MAX_MESSAGE_BYTES,
)
from services.contracts.errors import EngineRequestError, MessageInvalid
from services.contracts.proofs import claim_proof, split_verdict_proof
from services.gpu_worker.crashes import Crash
from services.gpu_worker.in_flight import InFlightBatch, WorkerIdentity
from services.gpu_worker.inference import DeadCause, Declined, InferenceResult
from tests.unit.gpu_worker.conftest import PROOF_KEY, RecordingBroker, delivered, verdict

IDENTITY = WorkerIdentity("node-1", "Tesla T4")
CAUSE = DeadCause(DeadReason.ENGINE_REFUSED, "never")


def answered(in_flight: InFlightBatch, indexes: Sequence[int], seconds: float = 0.0) -> None:
    claims = in_flight.claims(indexes)
    in_flight.record(
        indexes,
        InferenceResult(
            {n: verdict(claim) for n, claim in enumerate(claims)}, engine_seconds=seconds
        ),
    )


def settle(in_flight: InFlightBatch, broker: RecordingBroker) -> None:
    in_flight.settle(broker, broker, IDENTITY)  # type: ignore[arg-type]


@dataclass
class Account:
    """The claims in what was published."""

    verdicts: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    returned: dict[str, int] = field(default_factory=dict)
    """With the failures that they were part of."""

    @classmethod
    def of(cls, messages: Sequence[Outgoing]) -> "Account":
        account = cls()
        for message in messages:
            assert len(message.body) <= MAX_MESSAGE_BYTES
            match message.routing_key:
                case topology.VERDICTS_QUEUE:
                    assert (message.exchange, message.kind) == (
                        topology.VERDICTS_EXCHANGE,
                        "VerdictBatch",
                    )
                    batch = decode(VerdictBatch, message.body)
                    account.verdicts += [one.claim_id for one in batch.verdicts]
                    proofs_read = [split_verdict_proof(proof) for proof in batch.proofs]
                    assert [proof for proof, _ in proofs_read] == [
                        claim_proof(
                            PROOF_KEY, one.claim_id, one.position, one.text, one.gold, evidence
                        )
                        for one, (_, evidence) in zip(batch.verdicts, proofs_read, strict=False)
                    ]
                    assert batch.schema_version == (2 if proofs_read else 1)
                    assert batch.submission_id == ("sub-1" if proofs_read else None)
                case topology.DEAD_CLAIMS_QUEUE:
                    assert (message.exchange, message.kind) == (
                        topology.DEAD_EXCHANGE,
                        "DeadClaim",
                    )
                    dead = decode(DeadClaim, message.body)
                    account.dead.append(dead.claim.claim_id)
                    assert dead.proof in (None, dead.claim.proof(PROOF_KEY))
                    assert (dead.submission_id is None) == (dead.proof is None)
                case topology.RETURNS_QUEUE:
                    assert (message.exchange, message.kind) == (
                        topology.RETURNS_EXCHANGE,
                        "ClaimBatch",
                    )
                    failures = message.headers[topology.FAILURES_HEADER]
                    rest = decode(ClaimBatch, message.body)
                    account.returned |= {claim.claim_id: failures for claim in rest.claims}
                    proofs = tuple(claim.proof(PROOF_KEY) for claim in rest.claims)
                    assert rest.proofs in ((), proofs)
                    assert rest.schema_version == (2 if rest.proofs else 1)
                case other:
                    raise AssertionError(other)
        return account

    def all(self) -> Counter[str]:
        return Counter([*self.verdicts, *self.dead, *self.returned])


# Whatever happens.

HAPPENINGS = st.sampled_from(["record", "failure", "failure alone", "dead"])
STEPS = st.lists(st.tuples(HAPPENINGS, st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6))))


@given(steps=STEPS, earlier_failures=st.integers(0, 2))
def test_every_claim_is_once_among_verdicts_dead_and_returned_whatever_happened(
    steps: list[tuple[str, set[int], set[int]]], earlier_failures: int, batch: ClaimBatch
) -> None:
    in_flight = InFlightBatch(delivered(batch, failures=earlier_failures))
    expected = dict.fromkeys(range(7), ("returned", earlier_failures))
    for happening, chosen, others in steps:
        indexes = [index for index in sorted(chosen) if index in in_flight.unresolved]
        if happening == "record":
            claims = in_flight.claims(indexes)
            answers = {n: verdict(claim) for n, claim in enumerate(claims) if indexes[n] in others}
            refused = {n: CAUSE for n in range(len(indexes)) if n not in answers and indexes[n] % 2}
            in_flight.record(indexes, InferenceResult(answers, refused, EngineRequestError("gone")))
            expected |= {indexes[n]: ("verdict", 0) for n in answers}
            expected |= {indexes[n]: ("dead", 0) for n in refused}
        elif happening == "dead":
            for index in indexes:
                in_flight.mark_dead(index, CAUSE)
                expected[index] = ("dead", 0)
        else:
            alone = happening == "failure alone"
            in_flight.record_failure(sorted(chosen), alone=alone)
            for index in indexes:
                failures = expected[index][1]
                expected[index] = ("returned", failures + 1 if alone else max(1, failures))
    broker = RecordingBroker()
    settle(in_flight, broker)
    account = Account.of(broker.messages)
    if all(became == ("returned", earlier_failures) for became in expected.values()):
        assert (broker.messages, broker.settled) == ([], [("given back", 7)])
        return
    assert account.all() == Counter(claim.claim_id for claim in batch.claims)
    found = dict.fromkeys(account.verdicts, ("verdict", 0))
    found |= dict.fromkeys(account.dead, ("dead", 0))
    found |= {claim_id: ("returned", count) for claim_id, count in account.returned.items()}
    assert found == {f"c{number}": became for number, became in expected.items()}
    assert len({message.message_id for message in broker.messages}) == len(broker.messages)
    assert broker.settled == []
    for message in broker.messages:
        assert broker.settled == []
        broker.confirm(message)
    assert broker.settled == [("acknowledged", 7)]


# Settling.


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_batch_that_nothing_happened_to_is_given_back_whole(
    failures: int, batch: ClaimBatch, broker: RecordingBroker
) -> None:
    settle(InFlightBatch(delivered(batch, failures=failures)), broker)
    assert (broker.messages, broker.settled) == ([], [("given back", 7)])


def test_a_batch_with_only_a_failure_is_returned_with_the_failure(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    in_flight.record_failure(range(7))
    settle(in_flight, broker)
    assert Account.of(broker.messages).returned == {f"c{n}": 1 for n in range(7)}


def test_a_batch_of_which_every_claim_has_an_outcome_leaves_nothing_to_return(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    answered(in_flight, range(7))
    settle(in_flight, broker)
    (message,) = broker.messages
    assert message.routing_key == topology.VERDICTS_QUEUE


@pytest.mark.parametrize("last", range(3))
def test_a_batch_is_acknowledged_only_after_all_its_messages_are_confirmed_in_whatever_order(
    last: int, batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    answered(in_flight, [0, 1])
    in_flight.mark_dead(2, CAUSE)
    settle(in_flight, broker)
    late = broker.messages.pop(last)
    assert len(broker.messages) == 2
    for message in broker.messages:
        broker.confirm(message)
    assert broker.settled == []
    broker.confirm(late)
    assert broker.settled == [("acknowledged", 7)]


def test_what_is_returned_is_the_same_batch_with_fewer_claims(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    answered(in_flight, [0, 2, 4])
    settle(in_flight, broker)
    (message,) = broker.to(topology.RETURNS_QUEUE)
    rest = decode(ClaimBatch, message.body)
    left = (1, 3, 5, 6)
    assert rest == batch.model_copy(
        update={
            "claims": tuple(batch.claims[index] for index in left),
            "proofs": tuple(batch.proofs[index] for index in left),
        }
    )


def test_claims_go_back_with_the_failures_of_each(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch, failures=1))
    answered(in_flight, [0])
    in_flight.record_failure([1, 2], alone=True)
    in_flight.record_failure([2], alone=True)
    settle(in_flight, broker)
    returned = broker.to(topology.RETURNS_QUEUE)
    assert [message.headers[topology.FAILURES_HEADER] for message in returned] == [1, 2, 3]
    assert Account.of(returned).returned == {
        **{f"c{n}": 1 for n in (3, 4, 5, 6)},
        "c1": 2,
        "c2": 3,
    }


def test_verdicts_name_the_worker_and_the_engines_time_in_all(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch, earlier=3))
    answered(in_flight, [0, 1], seconds=1.5)
    answered(in_flight, [2], seconds=0.25)
    settle(in_flight, broker)
    (message,) = broker.to(topology.VERDICTS_QUEUE)
    sent = decode(VerdictBatch, message.body)
    assert (sent.run_id, sent.batch_id) == (batch.run.run_id, batch.batch_id)
    assert sent.labels == batch.run.prompt.label_names
    assert (sent.worker_id, sent.device, sent.attempt) == ("node-1", "Tesla T4", 4)
    assert sent.engine_seconds == 1.75


def test_dead_claims_go_one_by_one_with_reason_detail_attempt_and_failures(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch, earlier=4, failures=1))
    in_flight.record_failure([1], alone=True)
    in_flight.mark_dead(1, DeadCause(DeadReason.ENGINE_FAILED, "the engine died"))
    in_flight.mark_dead(5, CAUSE)
    settle(in_flight, broker)
    dead = [decode(DeadClaim, m.body) for m in broker.to(topology.DEAD_CLAIMS_QUEUE)]
    assert [each.claim for each in dead] == [batch.claims[1], batch.claims[5]]
    assert [each.reason for each in dead] == [DeadReason.ENGINE_FAILED, DeadReason.ENGINE_REFUSED]
    assert [each.detail for each in dead] == ["the engine died", "never"]
    assert [each.failures for each in dead] == [2, 1]
    for each in dead:
        assert (each.run_id, each.worker_id, each.attempt) == (batch.run.run_id, "node-1", 5)


@pytest.mark.parametrize("detail", ["d" * 100_000, "\0" * 20_000, "a\0b", "é" * 100_000])
def test_the_detail_of_a_death_is_cut_and_cleaned_to_fit_the_wire(
    detail: str, batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    in_flight.mark_dead(0, DeadCause(DeadReason.ENGINE_FAILED, detail))
    settle(in_flight, broker)
    (message,) = broker.to(topology.DEAD_CLAIMS_QUEUE)
    sent = decode(DeadClaim, message.body).detail
    assert len(sent) <= MAX_DETAIL_CHARS
    assert "\0" not in sent


# Trimming.


def trimmed(batch: ClaimBatch, keep: int, broker: RecordingBroker) -> InFlightBatch:
    in_flight = InFlightBatch(delivered(batch))
    in_flight.trim(keep, broker, broker)  # type: ignore[arg-type]
    return in_flight


def test_what_is_trimmed_goes_back_at_once_and_unharmed_and_the_first_claims_stay(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = trimmed(batch, 3, broker)
    assert list(in_flight.unresolved) == [0, 1, 2]
    (message,) = broker.messages
    assert Account.of([message]).returned == {f"c{n}": 0 for n in range(3, 7)}
    assert broker.settled == []


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_a_trimmed_batch_is_acknowledged_only_after_its_rest_and_all_else_are_confirmed(
    order: tuple[int, ...], batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = trimmed(batch, 3, broker)
    answered(in_flight, [0, 1])
    in_flight.mark_dead(2, CAUSE)
    settle(in_flight, broker)
    assert len({message.message_id for message in broker.messages}) == 3
    assert Account.of(broker.messages).all() == Counter(claim.claim_id for claim in batch.claims)
    for number in order:
        assert broker.settled == []
        broker.confirm(broker.messages[number])
    assert broker.settled == [("acknowledged", 7)]


def test_a_rest_that_is_confirmed_before_anything_is_answered_acknowledges_nothing(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = trimmed(batch, 3, broker)
    broker.confirm(broker.messages[0])
    assert broker.settled == []
    answered(in_flight, [0, 1, 2])
    settle(in_flight, broker)
    assert broker.settled == []
    broker.confirm(broker.messages[1])
    assert broker.settled == [("acknowledged", 7)]


def test_a_trimmed_batch_that_nobody_began_does_not_go_back_whole(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    settle(trimmed(batch, 3, broker), broker)
    assert Account.of(broker.messages).all() == Counter(claim.claim_id for claim in batch.claims)
    assert broker.settled == []


# Messages over the size limit.


def test_verdicts_that_do_not_fit_into_one_message_go_in_several(
    run: Run, broker: RecordingBroker
) -> None:
    # JSON writes each of these characters as six bytes.
    text = "x" + "\x01" * (MAX_CLAIM_CHARS - 1)
    claims = tuple(Claim(claim_id=f"c{n}", position=n, text=text) for n in range(160))
    batch = ClaimBatch(run=run, submission_id="s", batch_id="b", claims=claims)
    in_flight = InFlightBatch(delivered(batch))
    in_flight.record(
        range(160),
        InferenceResult(
            {
                n: verdict(claim).model_copy(update={"raw_text": "\x01" * 1_024})
                for n, claim in enumerate(claims)
            }
        ),
    )
    settle(in_flight, broker)
    assert len(broker.messages) == 2
    assert Account.of(broker.messages).verdicts == [claim.claim_id for claim in claims]
    broker.confirm(broker.messages[1])
    assert broker.settled == []
    broker.confirm(broker.messages[0])
    assert broker.settled == [("acknowledged", 7)]


def test_a_returned_batch_is_never_too_large_for_it_came_in_one_message(
    run: Run, broker: RecordingBroker
) -> None:
    evidence = "e" * MAX_EVIDENCE_CHARS
    claims = tuple(
        Claim(claim_id=f"c{n}", position=n, text="C.", evidence=evidence) for n in range(120)
    )
    batch = ClaimBatch(run=run, submission_id="s", batch_id="b", claims=claims)
    in_flight = InFlightBatch(delivered(batch))
    in_flight.record_failure(range(120))
    settle(in_flight, broker)
    (message,) = broker.messages
    assert Account.of([message]).returned == {f"c{n}": 1 for n in range(120)}


# Batches that failed before.


def test_a_batch_has_not_failed_before_until_an_engine_failed_with_it(batch: ClaimBatch) -> None:
    in_flight = InFlightBatch(delivered(batch))
    assert not in_flight.failed_before
    in_flight.record_failure([])
    assert not in_flight.failed_before
    in_flight.record_failure([3])
    assert in_flight.failed_before
    assert InFlightBatch(delivered(batch, failures=1)).failed_before


def test_a_batch_whose_failed_claims_have_an_outcome_counts_as_not_failed(
    batch: ClaimBatch,
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    in_flight.record_failure([3], alone=True)
    in_flight.mark_dead(3, CAUSE)
    assert not in_flight.failed_before


def test_failures_with_other_claims_count_once_and_failures_alone_add_up(batch: ClaimBatch) -> None:
    in_flight = InFlightBatch(delivered(batch))
    for _ in range(100):
        in_flight.record_failure(range(7))
    assert set(in_flight.unresolved.values()) == {1}
    in_flight.record_failure([2], alone=True)
    in_flight.record_failure(range(7))
    assert in_flight.unresolved == {**dict.fromkeys(range(7), 1), 2: 2}


def test_a_failure_does_not_count_for_claims_with_an_outcome(batch: ClaimBatch) -> None:
    in_flight = InFlightBatch(delivered(batch))
    answered(in_flight, [0, 1])
    in_flight.record_failure(range(7), alone=True)
    assert in_flight.unresolved == dict.fromkeys(range(2, 7), 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"body": b""},
        {"body": b"{}"},
        {"kind": "VerdictBatch"},
        {"kind": ""},
        {"content_type": "text/plain"},
        {"headers": {topology.FAILURES_HEADER: -1}},
        {"headers": {topology.FAILURES_HEADER: "3"}},
        {"headers": {topology.FAILURES_HEADER: 2**31}},
    ],
    ids=str,
)
def test_a_message_that_is_not_a_batch_of_claims_is_refused(
    changes: dict[str, object], batch: ClaimBatch
) -> None:
    with pytest.raises(MessageInvalid):
        InFlightBatch(delivered(batch, **changes))


# Claims that our engine declines.

REFUSED = Declined(CAUSE, counts_against_claim=True)
TOO_LONG = Declined(DeadCause(DeadReason.TOO_LONG, "long"), counts_against_claim=False)


def at(
    engine: str, batch: ClaimBatch, *, declined: Sequence[str] = (), waited: int = 0
) -> InFlightBatch:
    headers = {topology.DECLINED_HEADER: list(declined), topology.WAITED_HEADER: waited}
    return InFlightBatch(delivered(batch, headers=headers), engine, 60)


def returned(broker: RecordingBroker) -> dict[str, list[str]]:
    """Of each claim that goes back, which engines could not answer it."""
    return {
        claim.claim_id: list(message.headers.get(topology.DECLINED_HEADER, []))
        for message in broker.to(topology.RETURNS_QUEUE)
        for claim in decode(ClaimBatch, message.body).claims
    }


def test_claims_that_our_engine_cannot_answer_go_back_with_its_name_and_others_without(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = at("n1/a", batch)
    answered(in_flight, [0, 1])
    in_flight.record([2, 3], InferenceResult(declined={0: REFUSED, 1: TOO_LONG}))
    assert in_flight.declined == 2
    settle(in_flight, broker)
    assert returned(broker) == {
        "c2": ["engine-refused n1/a"],
        "c3": ["unable n1/a"],
        **{f"c{n}": [] for n in (4, 5, 6)},
    }


def test_claims_that_only_our_engine_declined_wait_and_each_engine_is_listed_once(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    for number in range(100):
        in_flight = at("n1/a", batch, declined=["unable n2/b", "unable n1/a"], waited=number % 60)
        assert in_flight.declined_here_before
        in_flight.decline(0, TOO_LONG)
        assert in_flight.declined == 1
        settle(in_flight, broker)
        assert returned(broker)["c0"] == ["unable n2/b", "unable n1/a"]
        broker.messages.clear()


def test_the_engines_that_travel_with_a_claim_are_bounded(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = at("n1/a", batch, declined=[f"unable n{number}/x" for number in range(2, 66)])
    in_flight.decline(0, TOO_LONG)
    settle(in_flight, broker)
    engines = returned(broker)["c0"]
    assert (len(engines), engines[0], engines[-1]) == (64, "unable n3/x", "unable n1/a")


@pytest.mark.parametrize(
    ("earlier", "declined", "dead"),
    [
        (["engine-refused n2/b"], REFUSED, True),
        (["engine-refused n1/a"], REFUSED, False),  # the same engine
        (["unable n2/b"], REFUSED, False),  # for another reason
        (["engine-failed n2/b"], REFUSED, False),
        (["unable n2/b", "unable n3/c"], TOO_LONG, False),  # however many are too short
    ],
)
def test_a_claim_is_dead_when_two_engines_decline_it_for_the_same_reason(
    earlier: list[str],
    declined: Declined,
    dead: bool,
    batch: ClaimBatch,
    broker: RecordingBroker,
) -> None:
    in_flight = at("n1/a", batch, declined=earlier)
    in_flight.decline(0, declined)
    settle(in_flight, broker)
    account = Account.of(broker.messages)
    assert account.dead == (["c0"] if dead else [])


@pytest.mark.parametrize("declined", [REFUSED, TOO_LONG])
def test_a_claim_that_no_other_engine_answered_in_time_is_dead_with_that_reason(
    declined: Declined, batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = at("n1/a", batch, declined=["unable n2/b", "unable n1/a"], waited=60)
    assert not in_flight.declined_here_before  # it is asked once more
    in_flight.decline(0, declined)
    settle(in_flight, broker)
    (message,) = broker.to(topology.DEAD_CLAIMS_QUEUE)
    dead = decode(DeadClaim, message.body)
    assert dead.reason is declined.cause.reason
    assert dead.detail == (
        f"{declined.cause.detail}\nNo other engine answered the claim, which waited 60 s for one "
        "(KEEPWARM_OTHER_ENGINE_SECONDS). Tried: n1/a, n2/b."
    )


def test_a_batch_that_only_waited_goes_back_with_its_time(
    batch: ClaimBatch, broker: RecordingBroker
) -> None:
    in_flight = at("n1/a", batch, declined=["unable n1/a"], waited=5)
    in_flight.waited_seconds += 5
    settle(in_flight, broker)
    (message,) = broker.to(topology.RETURNS_QUEUE)
    assert message.headers[topology.WAITED_HEADER] == 10
    assert len(Account.of(broker.messages).returned) == 7


# Claims that workers of this node crashed with.


def test_claims_that_a_worker_crashed_with_have_failed_before_and_its_crashes_are_added(
    batch: ClaimBatch,
) -> None:
    in_flight = InFlightBatch(delivered(batch, failures=2))
    in_flight.record_crash(1, Crash(1, "why", memory=False))
    assert in_flight.failed_before and in_flight.unresolved[1] == 3
    fresh = InFlightBatch(delivered(batch))
    fresh.record_crash(1, Crash(0, "why", memory=False))
    assert fresh.failed_before and fresh.unresolved[1] == 1


def test_what_becomes_of_claims_carries_their_proofs_and_without_any_is_as_older_readers_know_it(
    batch: ClaimBatch,
) -> None:
    older = batch.model_copy(update={"schema_version": 1, "proofs": ()})
    for of, proven in ((batch, True), (older, False)):
        in_flight, broker = InFlightBatch(delivered(of)), RecordingBroker()
        answered(in_flight, [2, 0])
        in_flight.mark_dead(1, CAUSE)
        settle(in_flight, broker)
        assert Account.of(broker.messages).all().total() == 7
        assert all((b'"proof' in m.body) == proven for m in broker.messages)
        assert all((b'"schema_version":2' in m.body) == proven for m in broker.messages)
