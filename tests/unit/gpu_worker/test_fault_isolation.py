"""Fault isolation, with a small fake engine whose faults are known."""

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contexts.engine_client import Answer, EngineSilent, Interrupted
from services.contracts import (
    Claim,
    ClaimBatch,
    DeadClaim,
    DeadReason,
    PromptSpec,
    Run,
    VerdictBatch,
    decode,
    load_settings,
    topology,
)
from services.contracts.errors import (
    EngineError,
    EngineRequestError,
    EngineStartError,
    KeeperError,
)
from services.gpu_worker.crashes import Crash, CrashRecords
from services.gpu_worker.fault_isolation import FaultIsolation, prompt_key
from services.gpu_worker.in_flight import InFlightBatch, WorkerIdentity
from services.gpu_worker.inference import (
    DeadCause,
    Declined,
    InferenceResult,
    WorkerFailure,
    read_verdict,
)
from tests.unit.gpu_worker.conftest import RecordingBroker, delivered

ANSWER = Answer("True", (-1.0, -2.0, -3.0))
Fault = Callable[[str], str]


class Engine:
    """Engine and inference in one. `fault` maps a claim to what it does to the engine: `crash` it,
    `hang` it, make it answer `nonsense`, be `refused`, or nothing.
    """

    def __init__(
        self,
        fault: Fault = lambda _: "",
        failing_starts: int = 0,
        starts_fail_with: type[EngineError] = EngineStartError,
    ) -> None:
        self.fault = fault
        self.failing_starts = failing_starts
        self.starts_fail_with = starts_fail_with
        self.alive = True
        self.hangs = False
        self.ran_out_of_memory = False
        self.starts = 0
        self.asked: list[list[str]] = []
        self.before_asking: Callable[[], None] = lambda: None

    def start(self, stop: threading.Event) -> bool:
        self.starts += 1
        if self.starts <= self.failing_starts:
            raise self.starts_fail_with("it ended")
        if stop.is_set():
            return False
        self.alive, self.hangs = True, False
        return True

    def stop(self) -> None:
        self.alive = False

    def check(self) -> None:
        """What happened is known here at once."""

    def log_tail(self) -> list[str]:
        return ["INFO loading", "Segmentation fault"]

    def start_error(self, what: str) -> EngineStartError:
        return EngineStartError(f"no engine: {what}")

    def infer(self, prompt: PromptSpec, claims: Sequence[Claim]) -> InferenceResult:
        self.before_asking()
        self.asked.append([claim.claim_id for claim in claims])
        outcome = InferenceResult()
        for index, claim in enumerate(claims):
            if not self.alive:
                outcome.failure = EngineRequestError("the engine broke off")
                break
            if self.hangs:
                outcome.failure = EngineSilent("the engine timed out")
                break
            match self.fault(claim.claim_id):
                case "crash":
                    self.alive = False
                    outcome.failure = EngineRequestError("the engine broke off")
                    break
                case "hang":
                    self.hangs = True
                    outcome.failure = EngineSilent("the engine timed out")
                    break
                case "nonsense":
                    continue
                case "worker fails":
                    outcome.failure = WorkerFailure(RuntimeError(claim.claim_id))
                    break
                case "out of memory":
                    self.alive, self.ran_out_of_memory = False, True
                    outcome.failure = EngineRequestError("the engine broke off")
                    break
                case "declined":
                    outcome.declined[index] = Declined(
                        DeadCause(DeadReason.ENGINE_REFUSED, "never"), counts_against_claim=True
                    )
                case "refused":
                    outcome.dead[index] = DeadCause(DeadReason.TOO_LONG, "long")
                case _:
                    outcome.verdicts[index] = read_verdict(claim, ANSWER, prompt, 3)
        return outcome


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gpu_worker.fault_isolation._LONGEST_PAUSE_SECONDS", 0.0)


def isolation(
    engine: Engine,
    stop: threading.Event | None = None,
    crashes: CrashRecords | None = None,
    **how: object,
) -> FaultIsolation:
    return FaultIsolation(
        engine,  # type: ignore[arg-type]
        engine,  # type: ignore[arg-type]
        load_settings(**how),
        stop or threading.Event(),
        crashes or NoCrashes(),  # type: ignore[arg-type]
    )


class NoCrashes:
    """Nobody died here."""

    def recorded(self, *_: object, **__: object) -> AbstractContextManager[None]:
        return nullcontext()

    def get(self, _: object) -> None:
        return None

    def forget(self, _: object) -> None:
        pass


def quarantined(batch: ClaimBatch) -> InFlightBatch:
    """A batch that an engine failed with once, all of it."""
    in_flight = InFlightBatch(delivered(batch))
    in_flight.record_failure(range(len(batch.claims)))
    return in_flight


def became(in_flight: InFlightBatch) -> SimpleNamespace:
    broker = RecordingBroker()
    in_flight.settle(broker, broker, WorkerIdentity("w", "d"))  # type: ignore[arg-type]
    verdicts = [decode(VerdictBatch, m.body) for m in broker.to(topology.VERDICTS_QUEUE)]
    dead = [decode(DeadClaim, m.body) for m in broker.to(topology.DEAD_CLAIMS_QUEUE)]
    return SimpleNamespace(
        answered={v.claim_id for each in verdicts for v in each.verdicts},
        dead={each.claim.claim_id: each for each in dead},
        unresolved=dict(in_flight.unresolved),
    )


def only(poison: str, fault: str) -> Fault:
    return lambda claim_id: fault if claim_id == poison else ""


EVERYBODY = {f"c{n}" for n in range(7)}


@pytest.mark.parametrize("fault", ["crash", "hang", "nonsense"])
@pytest.mark.parametrize("claim_failures", [2, 3, 5])
def test_the_claim_that_the_engine_fails_with_is_given_up_on_and_the_others_are_answered(
    fault: str, claim_failures: int, batch: ClaimBatch
) -> None:
    engine = Engine(only("c3", fault))
    in_flight = quarantined(batch)
    isolation(engine, claim_failures=claim_failures).isolate(in_flight)
    found = became(in_flight)
    assert found.unresolved == {}
    assert found.answered == EVERYBODY - {"c3"}
    (dead,) = found.dead.values()
    assert (dead.claim.claim_id, dead.reason) == ("c3", DeadReason.ENGINE_FAILED)
    assert dead.failures == claim_failures
    assert engine.asked.count(["c3"]) == claim_failures - 1
    assert [asked for asked in engine.asked if len(asked) > 1] == [sorted(EVERYBODY)]
    assert engine.starts == (0 if fault == "nonsense" else claim_failures)
    assert engine.alive


def test_a_batch_that_was_only_there_when_the_engine_failed_is_asked_as_a_whole(
    batch: ClaimBatch,
) -> None:
    engine = Engine()
    in_flight = quarantined(batch)
    isolation(engine).isolate(in_flight)
    assert became(in_flight).answered == EVERYBODY
    assert engine.asked == [["harmless"], sorted(EVERYBODY)]


def test_a_death_tells_how_often_the_engine_failed_and_the_end_of_its_log(
    batch: ClaimBatch,
) -> None:
    in_flight = quarantined(batch)
    isolation(Engine(only("c3", "crash"))).isolate(in_flight)
    detail = became(in_flight).dead["c3"].detail
    assert "failed 3 times with this claim, 2 of them alone, and not with a harmless one" in detail
    assert "the engine broke off" in detail
    assert detail.endswith("INFO loading\nSegmentation fault")


def test_an_unusable_answer_is_named_in_the_dead_claim(batch: ClaimBatch) -> None:
    in_flight = quarantined(batch)
    isolation(Engine(only("c3", "nonsense"))).isolate(in_flight)
    assert "it gave no usable answer: aborted, or scores" in became(in_flight).dead["c3"].detail


@given(
    faults=st.lists(
        st.sampled_from(["", "", "crash", "hang", "nonsense", "refused"]), min_size=7, max_size=7
    ),
    claim_failures=st.integers(2, 4),
)
def test_whatever_is_wrong_with_which_claims_each_gets_the_outcome_that_it_deserves(
    faults: list[str], claim_failures: int, batch: ClaimBatch
) -> None:
    by_id = {f"c{number}": fault for number, fault in enumerate(faults)}
    in_flight = quarantined(batch)
    engine = Engine(lambda claim_id: by_id.get(claim_id, ""))
    isolation(engine, claim_failures=claim_failures).isolate(in_flight)
    found = became(in_flight)
    assert found.unresolved == {}
    assert found.answered == {claim_id for claim_id, fault in by_id.items() if not fault}
    reasons = {claim_id: dead.reason for claim_id, dead in found.dead.items()}
    assert reasons == {
        claim_id: DeadReason.TOO_LONG if fault == "refused" else DeadReason.ENGINE_FAILED
        for claim_id, fault in by_id.items()
        if fault
    }


def test_a_claim_that_fails_now_and_then_is_answered_when_it_succeeds(batch: ClaimBatch) -> None:
    faults = {"c3": ["crash", ""]}
    engine = Engine(
        lambda claim_id: faults.get(claim_id, [""]).pop(0) if claim_id in faults else ""
    )
    in_flight = quarantined(batch)
    isolation(engine).isolate(in_flight)
    assert became(in_flight).answered == EVERYBODY


def test_the_failures_that_a_claim_came_with_count(batch: ClaimBatch) -> None:
    in_flight = InFlightBatch(delivered(batch, failures=2))
    engine = Engine(only("c3", "crash"))
    isolation(engine, claim_failures=3).isolate(in_flight)
    assert list(became(in_flight).dead) == ["c3"]
    assert engine.asked.count(["c3"]) == 1


def test_claims_without_a_fault_are_all_answered_and_no_failure_is_recorded(
    batch: ClaimBatch,
) -> None:
    in_flight = quarantined(batch)
    isolation(Engine()).isolate(in_flight)
    assert became(in_flight).answered == EVERYBODY


def test_a_claim_that_fails_with_others_a_hundred_times_is_not_given_up(
    batch: ClaimBatch,
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    for _ in range(100):
        in_flight.record_failure(range(7))
    isolation(Engine(), claim_failures=2).isolate(in_flight)
    assert became(in_flight).answered == EVERYBODY


# The engine's own fault.


@pytest.mark.parametrize("fault", ["crash", "hang", "nonsense"])
@pytest.mark.parametrize("attempts", [1, 3])
def test_an_engine_that_fails_with_the_canary_too_is_at_fault_and_no_claim_is_dead(
    fault: str, attempts: int, batch: ClaimBatch
) -> None:
    engine = Engine(lambda _: fault)
    in_flight = quarantined(batch)
    with pytest.raises(EngineStartError, match="fails with a harmless claim"):
        isolation(engine, engine_start_attempts=attempts).isolate(in_flight)
    found = became(in_flight)
    assert (found.answered, found.dead) == (set(), {})
    assert found.unresolved == dict.fromkeys(range(7), 1)
    assert engine.asked == [["harmless"]] * attempts
    assert not engine.alive


def test_an_engine_that_begins_to_fail_half_way_takes_no_claim_with_it(batch: ClaimBatch) -> None:
    engine = Engine()
    seen: set[str] = set()

    def fault(claim_id: str) -> str:
        seen.add(claim_id)
        return "crash" if "c2" in seen else ""

    engine.fault = fault
    in_flight = quarantined(batch)
    with pytest.raises(EngineStartError):
        isolation(engine).isolate(in_flight)
    found = became(in_flight)
    assert (found.answered, found.dead) == ({"c0", "c1"}, {})
    assert found.unresolved == dict.fromkeys(range(2, 7), 1)


def test_an_engine_that_recovers_in_time_is_used_again(batch: ClaimBatch) -> None:
    engine = Engine()
    engine.fault = lambda _: "crash" if len(engine.asked) < 3 else ""
    in_flight = quarantined(batch)
    isolation(engine, engine_start_attempts=3).isolate(in_flight)
    assert became(in_flight).answered == EVERYBODY
    assert engine.starts == 2


def test_a_prompt_that_not_even_a_harmless_claim_fits_into_is_not_the_engines_fault(
    batch: ClaimBatch,
) -> None:
    in_flight = quarantined(batch)
    isolation(Engine(lambda _: "refused")).isolate(in_flight)
    assert set(became(in_flight).dead) == EVERYBODY


def test_an_engine_that_hangs_is_ended_and_one_that_fails_otherwise_is_left_alone() -> None:
    engine = Engine()
    minder = isolation(engine)
    minder.handle_failure(None)
    minder.handle_failure(EngineRequestError("no"))
    minder.handle_failure(Interrupted("interrupted"))
    assert engine.alive
    minder.handle_failure(EngineSilent("it timed out"))
    assert not engine.alive


# Starting the engine.


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [EngineStartError, KeeperError])
def test_an_engine_that_does_not_start_or_whose_keeper_is_away_is_started_again(
    failing: int, error: type[EngineError]
) -> None:
    engine = Engine(failing_starts=failing, starts_fail_with=error)
    assert isolation(engine).start_engine(attempts=3)
    assert engine.starts == failing + 1


@pytest.mark.parametrize("attempts", [1, 3])
def test_an_engine_that_never_starts_is_given_up_on(attempts: int) -> None:
    engine = Engine(failing_starts=100)
    with pytest.raises(EngineStartError, match="it ended"):
        isolation(engine).start_engine(attempts)
    assert engine.starts == attempts


# Told to stop.


def test_stopped_while_the_engine_starts_it_starts_none() -> None:
    stop = threading.Event()
    stop.set()
    assert not isolation(Engine(), stop).start_engine(attempts=3)


def test_stopped_before_the_restart_it_does_not_restart() -> None:
    stop = threading.Event()
    stop.set()
    engine = Engine(failing_starts=1)
    assert not isolation(engine, stop).start_engine(attempts=3)
    assert engine.starts == 1


@pytest.mark.parametrize("asked", range(10))
@pytest.mark.parametrize("fault", ["", "crash", "hang", "nonsense"])
def test_stopped_it_leaves_claims_unresolved_and_records_no_more_failures(
    fault: str, asked: int, batch: ClaimBatch
) -> None:
    stop = threading.Event()
    engine = Engine(only("c1", fault))

    def count_down() -> None:
        if len(engine.asked) == asked:
            stop.set()

    engine.before_asking = count_down
    in_flight = quarantined(batch)
    isolation(engine, stop, claim_failures=100).isolate(in_flight)
    found = became(in_flight)
    assert found.dead == {}
    assert {f"c{index}" for index in found.unresolved} == EVERYBODY - found.answered
    # c1 has each failure after which the engine answered a canary.
    proven = engine.asked.count(["c1"]) if fault else 0
    for index, failures in found.unresolved.items():
        assert 1 <= failures <= 1 + (proven if index == 1 else 0)


def test_stopped_while_it_asks_the_canary_it_records_no_failure(
    batch: ClaimBatch,
) -> None:
    stop = threading.Event()
    engine = Engine(only("c0", "crash"))
    engine.before_asking = lambda: stop.set() if engine.asked[-1:] == [["harmless"]] else None
    in_flight = quarantined(batch)
    isolation(engine, stop).isolate(in_flight)
    assert became(in_flight).unresolved == dict.fromkeys(range(7), 1)


def test_a_failure_that_we_made_ourselves_is_nobodys_fault(
    batch: ClaimBatch, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    monkeypatch.setattr(
        engine, "infer", lambda *_: InferenceResult(failure=Interrupted("interrupted"))
    )
    in_flight = quarantined(batch)
    isolation(engine).isolate(in_flight)
    found = became(in_flight)
    assert (found.dead, found.unresolved) == ({}, dict.fromkeys(range(7), 1))


# The worker's own fault.


def test_a_claim_that_the_worker_itself_fails_with_is_dead_with_the_trace(
    batch: ClaimBatch,
) -> None:
    engine = Engine(only("c3", "worker fails"))
    in_flight = quarantined(batch)
    isolation(engine).isolate(in_flight)
    found = became(in_flight)
    assert found.answered == EVERYBODY - {"c3"}
    (dead,) = found.dead.values()
    assert (dead.reason, dead.failures) == (DeadReason.WORKER_FAILED, 3)
    assert "the worker failed 3 times with this claim, 2 of them alone" in dead.detail
    assert "RuntimeError: c3" in dead.detail
    assert engine.starts == 0


def test_a_worker_that_fails_with_the_canary_too_ends_and_no_claim_is_dead(
    batch: ClaimBatch,
) -> None:
    in_flight = quarantined(batch)
    with pytest.raises(WorkerFailure, match="Restart the worker"):
        isolation(Engine(lambda _: "worker fails")).isolate(in_flight)
    assert became(in_flight).unresolved == dict.fromkeys(range(7), 1)


def with_prompt(batch: ClaimBatch, prompt: PromptSpec) -> ClaimBatch:
    return batch.model_copy(update={"run": batch.run.model_copy(update={"prompt": prompt})})


def test_a_prompt_that_the_worker_fails_with_for_any_claim_makes_only_its_own_claims_dead(
    batch: ClaimBatch,
) -> None:
    class FailsWithThePrompt(Engine):
        def infer(self, prompt: PromptSpec, claims: Sequence[Claim]) -> InferenceResult:
            self.fault = lambda _: "worker fails" if prompt.name == "cursed" else ""
            return super().infer(prompt, claims)

    in_flight = quarantined(with_prompt(batch, PromptSpec(name="cursed")))
    isolation(FailsWithThePrompt()).isolate(in_flight)
    dead = became(in_flight).dead
    assert set(dead) == EVERYBODY
    assert {each.reason for each in dead.values()} == {DeadReason.PROMPT_UNUSABLE}
    assert "the worker fails with this prompt for any claim" in dead["c0"].detail


# Workers that crashed.


def died(alone: int, *, memory: bool = False) -> Crash:
    return Crash(alone, "Fatal Python error: Segmentation fault", memory)


def test_a_claim_that_workers_died_of_alone_goes_back_by_itself_after_the_others_were_answered(
    batch: ClaimBatch,
) -> None:
    engine = Engine()
    in_flight = quarantined(batch)
    in_flight.record_crash(3, died(1))
    isolation(engine).isolate(in_flight)
    assert ["c3"] not in engine.asked
    found = became(in_flight)
    assert (found.answered, found.unresolved) == (EVERYBODY - {"c3"}, {3: 2})


def test_in_a_batch_of_its_own_it_is_asked_once_more(batch: ClaimBatch) -> None:
    engine = Engine()
    in_flight = quarantined(batch.only([3]))
    in_flight.record_crash(0, died(1))
    isolation(engine).isolate(in_flight)
    assert became(in_flight).answered == {"c3"}


def test_a_claim_that_workers_died_of_often_enough_is_dead_with_what_they_left(
    batch: ClaimBatch,
) -> None:
    engine = Engine()
    in_flight = quarantined(batch)
    in_flight.record_crash(3, died(2))
    isolation(engine).isolate(in_flight)
    assert ["c3"] not in engine.asked
    (dead,) = became(in_flight).dead.values()
    assert (dead.claim.claim_id, dead.reason) == ("c3", DeadReason.WORKER_FAILED)
    assert dead.failures == 3
    assert "the worker's process crashed 3 times with this claim, 2 of them alone" in dead.detail
    assert dead.detail.endswith("Fatal Python error: Segmentation fault")


def test_claims_that_a_worker_crashed_with_together_are_asked_alone_and_answered(
    batch: ClaimBatch,
) -> None:
    in_flight = InFlightBatch(delivered(batch))
    for index in range(7):
        in_flight.record_crash(index, died(0))
    engine = Engine()
    isolation(engine).isolate(in_flight)
    assert became(in_flight).answered == EVERYBODY
    assert all(len(asked) == 1 for asked in engine.asked)


def test_while_a_claim_is_asked_alone_that_is_on_disk_and_so_is_the_harmless_one_before_it(
    batch: ClaimBatch, crashes: CrashRecords
) -> None:
    in_flight = quarantined(batch)
    in_flight.record_failure(range(7), alone=True)  # else the whole batch is asked first
    seen: list[list[object]] = []
    engine = Engine()
    workers = crashes._own_dir

    def on_disk() -> None:
        seen.append([json.loads(path.read_text()) for path in workers.glob("*.json")])

    engine.before_asking = on_disk
    isolation(engine, crashes=crashes).isolate(in_flight)
    prompt, run_id = batch.run.prompt, batch.run.run_id
    keys = [[list(prompt_key(prompt))]] + [[[run_id, f"c{n}"]] for n in range(7)]
    assert [[record["keys"] for record in each] for each in seen] == [[key] for key in keys]  # type: ignore[index]
    assert all(record["alone"] for each in seen for record in each)  # type: ignore[index]


def test_a_prompt_that_crashed_workers_makes_its_claims_dead_if_another_prompt_is_answered(
    batch: ClaimBatch, crashes: CrashRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursed = PromptSpec(name="cursed")
    of = {prompt_key(cursed): died(3)}
    monkeypatch.setattr(crashes, "get", of.get)
    engine = Engine()
    in_flight = quarantined(with_prompt(batch, cursed))
    isolation(engine, crashes=crashes).isolate(in_flight)
    dead = became(in_flight).dead
    assert set(dead) == EVERYBODY
    assert {each.reason for each in dead.values()} == {DeadReason.PROMPT_UNUSABLE}
    assert engine.asked == [["harmless"]]


# What another engine may be able to answer.


def returned(in_flight: InFlightBatch) -> list[tuple[list[str], dict[str, object]]]:
    broker = RecordingBroker()
    in_flight.settle(broker, broker, WorkerIdentity("w", "d"))  # type: ignore[arg-type]
    return [
        ([claim.claim_id for claim in decode(ClaimBatch, m.body).claims], dict(m.headers))
        for m in broker.to(topology.RETURNS_QUEUE)
    ]


def batch_at(engine: str, batch: ClaimBatch, **headers: object) -> InFlightBatch:
    headers = {topology.FAILURES_HEADER: 1, **headers}
    return InFlightBatch(delivered(batch, headers=headers), engine, 60)


@pytest.mark.parametrize(
    ("fault", "failures", "reason"),
    [("out of memory", 3, "engine-failed"), ("declined", 1, "engine-refused")],
)
def test_a_claim_that_an_engine_has_no_memory_for_or_refuses_is_left_to_another(
    fault: str, failures: int, reason: str, batch: ClaimBatch
) -> None:
    in_flight = batch_at("n1/small", batch)
    isolation(Engine(only("c3", fault))).isolate(in_flight)
    ((ids, headers),) = returned(in_flight)
    assert ids == ["c3"]
    assert headers == {
        topology.FAILURES_HEADER: failures,
        topology.DECLINED_HEADER: [f"{reason} n1/small"],
        topology.WAITED_HEADER: 0,
    }


@pytest.mark.parametrize(
    ("fault", "reason", "before", "others"),
    [
        ("declined", "engine-refused", ["engine-refused n1/small"], "n1/small"),
        (
            "out of memory",
            "engine-failed",
            ["engine-failed n1/small", "engine-failed n3/small"],
            "n1/small, n3/small",
        ),
    ],
)
def test_a_claim_is_dead_when_other_engines_or_nodes_decline_it_for_the_same_reason(
    fault: str, reason: str, before: list[str], others: str, batch: ClaimBatch
) -> None:
    in_flight = batch_at("n2/small", batch, **{topology.DECLINED_HEADER: before})
    isolation(Engine(only("c3", fault))).isolate(in_flight)
    (dead,) = became(in_flight).dead.values()
    assert (dead.claim.claim_id, dead.reason) == ("c3", reason)
    assert f"Declined as well by: {others}." in dead.detail


def test_a_claim_for_which_two_nodes_lack_the_memory_is_left_to_a_third(batch: ClaimBatch) -> None:
    before = ["engine-failed n1/gpu-0", "engine-failed n1/gpu-1"]
    in_flight = batch_at("n2/small", batch, **{topology.DECLINED_HEADER: before})
    isolation(Engine(only("c3", "out of memory"))).isolate(in_flight)
    ((ids, headers),) = returned(in_flight)
    assert ids == ["c3"]
    assert headers[topology.DECLINED_HEADER] == [*before, "engine-failed n2/small"]


def test_a_claim_that_workers_died_of_for_lack_of_memory_is_left_to_another_node(
    batch: ClaimBatch,
) -> None:
    in_flight = batch_at("n1/small", batch)
    in_flight.record_crash(3, died(2, memory=True))
    isolation(Engine()).isolate(in_flight)
    ((ids, headers),) = returned(in_flight)
    assert (ids, headers[topology.DECLINED_HEADER]) == (["c3"], ["worker-failed n1/small"])
