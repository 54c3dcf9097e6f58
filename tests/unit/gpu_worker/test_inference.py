from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import (
    Claim,
    ClaimBatch,
    DeadReason,
    Label,
    PromptSpec,
    Run,
    decode,
    encode,
)
from services.contracts.errors import EngineRequestError
from services.gpu_worker import CompiledPrompt, ModelTokenizer
from services.gpu_worker.completions import Answer, EngineRefused
from services.gpu_worker.inference import Inference, Outcome

Prompt = Sequence[int]


class Engine:
    """Stands for an engine: scores every prompt alike, and refuses those that it is told to."""

    def __init__(self, refuses: Callable[[Prompt], bool] = lambda _: False) -> None:
        self._refuses = refuses
        self.requests: list[list[Prompt]] = []
        self.tokens: set[tuple[int, ...]] = set()

    def score(self, prompts: Sequence[Prompt], tokens: Sequence[int]) -> list[Answer]:
        self.requests.append(list(prompts))
        self.tokens.add(tuple(tokens))
        if any(self._refuses(prompt) for prompt in prompts):
            raise EngineRefused("the engine refused the request: never")
        scores = tuple(-1.0 - index for index in range(len(tokens)))
        return [Answer("True", scores) for _ in prompts]


def infer(
    batch: ClaimBatch,
    tokenizer: ModelTokenizer,
    engine: Engine,
    *,
    attempt: int = 1,
    max_model_tokens: int = 1024,
) -> Outcome:
    return Inference(
        tokenizer,
        engine,  # type: ignore[arg-type]
        max_model_tokens=max_model_tokens,
        worker_id="node-1",
        device_name="Tesla T4",
    ).infer(batch, attempt)


def encoded(batch: ClaimBatch, tokenizer: ModelTokenizer) -> list[list[int]]:
    return CompiledPrompt(batch.run.prompt, tokenizer).encode(batch.claims)


def ids(outcome: Outcome) -> tuple[list[str], list[str]]:
    verdicts = outcome.verdicts.verdicts if outcome.verdicts else ()
    return [v.claim_id for v in verdicts], [dead.claim.claim_id for dead in outcome.dead]


def test_every_claim_gets_a_verdict_in_order(batch: ClaimBatch, tokenizer: ModelTokenizer) -> None:
    engine = Engine()
    outcome = infer(batch, tokenizer, engine, attempt=3)
    assert ids(outcome) == ([claim.claim_id for claim in batch.claims], [])
    assert engine.requests == [encoded(batch, tokenizer)]
    verdicts = outcome.verdicts
    assert verdicts is not None
    assert (verdicts.run_id, verdicts.batch_id) == (batch.run.run_id, batch.batch_id)
    assert (verdicts.worker_id, verdicts.device, verdicts.attempt) == ("node-1", "Tesla T4", 3)
    assert verdicts.labels == batch.run.prompt.label_names
    assert verdicts.engine_seconds >= 0
    assert [v.prompt_tokens for v in verdicts.verdicts] == [len(p) for p in engine.requests[0]]


def test_the_engine_scores_the_tokens_of_the_prompts_labels(
    batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    engine = Engine()
    infer(batch, tokenizer, engine)
    assert engine.tokens == {CompiledPrompt(batch.run.prompt, tokenizer).label_tokens}


def test_an_outcome_fits_the_wire(batch: ClaimBatch, tokenizer: ModelTokenizer) -> None:
    refused = encoded(batch, tokenizer)[2]
    outcome = infer(batch, tokenizer, Engine(lambda prompt: prompt == refused))
    assert outcome.verdicts is not None
    assert decode(type(outcome.verdicts), encode(outcome.verdicts)) == outcome.verdicts
    (dead,) = outcome.dead
    assert decode(type(dead), encode(dead)) == dead


def with_claims(batch: ClaimBatch, *texts: str) -> ClaimBatch:
    claims = tuple(
        Claim(claim_id=f"c{n}", position=n, text=text, gold="SUPPORTS")
        for n, text in enumerate(texts)
    )
    return batch.model_copy(update={"claims": claims})


def test_a_claim_that_is_too_long_is_dead_and_harms_no_other(
    batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    mixed = with_claims(batch, "Short.", "long " * 1_500, "Short too.")
    engine = Engine()
    outcome = infer(mixed, tokenizer, engine, attempt=2)
    assert ids(outcome) == (["c0", "c2"], ["c1"])
    (dead,) = outcome.dead
    length = len(encoded(mixed, tokenizer)[1])
    assert dead.reason is DeadReason.TOO_LONG
    assert f"the prompt has {length:,} tokens; this context takes 1,023" in dead.detail
    assert "--max-model-tokens" in dead.detail
    assert (dead.run_id, dead.worker_id, dead.attempt) == (batch.run.run_id, "node-1", 2)
    assert dead.claim == mixed.claims[1]
    assert all(len(prompt) < 1_024 for request in engine.requests for prompt in request)


@pytest.mark.parametrize(("room", "dead"), [(0, ["c0"]), (1, [])])
def test_the_longest_prompt_leaves_room_for_the_answers_one_token(
    room: int, dead: list[str], batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    one = with_claims(batch, "Short.")
    length = len(encoded(one, tokenizer)[0])
    outcome = infer(one, tokenizer, Engine(), max_model_tokens=length + room)
    assert ids(outcome)[1] == dead


def test_when_every_claim_is_too_long_the_engine_is_not_asked(
    batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    engine = Engine()
    outcome = infer(batch, tokenizer, engine, max_model_tokens=16)
    assert outcome.verdicts is None
    assert len(outcome.dead) == len(batch.claims)
    assert engine.requests == []


@given(poison=st.sets(st.integers(0, 6)))
def test_a_refused_request_is_halved_down_to_the_claims_that_poison_it(
    poison: set[int], run: Run, tokenizer: ModelTokenizer
) -> None:
    batch = with_claims(
        ClaimBatch(run=run, batch_id="b", claims=(Claim(claim_id="c", position=0, text="t"),)),
        *(f"Claim {n}." for n in range(7)),
    )
    prompts = encoded(batch, tokenizer)
    poisoned = [prompts[index] for index in poison]
    engine = Engine(lambda prompt: prompt in poisoned)
    outcome = infer(batch, tokenizer, engine)
    verdicts, dead = ids(outcome)
    assert dead == [f"c{n}" for n in sorted(poison)]
    assert verdicts == [f"c{n}" for n in range(7) if n not in poison]
    assert all(d.reason is DeadReason.ENGINE_REFUSED for d in outcome.dead)
    assert all("the engine refused the request: never" in d.detail for d in outcome.dead)
    assert len(engine.requests) <= 2 * 7 - 1


def test_a_label_word_that_cannot_be_told_apart_kills_the_claims_and_not_the_worker(
    run: Run, batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    labels = (Label(name="A", word="Unknown"), Label(name="B", word="Unknown"))
    unusable = run.model_copy(update={"prompt": PromptSpec(name="mine", labels=labels)})
    engine = Engine()
    outcome = infer(batch.model_copy(update={"run": unusable}), tokenizer, engine)
    assert outcome.verdicts is None
    assert ids(outcome)[1] == [claim.claim_id for claim in batch.claims]
    assert all(dead.reason is DeadReason.PROMPT_UNUSABLE for dead in outcome.dead)
    assert all("'Unknown' (A) and 'Unknown' (B)" in dead.detail for dead in outcome.dead)
    assert engine.requests == []


def test_when_the_engine_fails_no_claim_has_an_outcome(
    batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    class Failing(Engine):
        def score(self, *_: object) -> list[Answer]:
            raise EngineRequestError("no answer from the engine by the deadline")

    with pytest.raises(EngineRequestError, match="by the deadline"):
        infer(batch, tokenizer, Failing())


def test_when_the_engine_fails_while_a_request_is_halved_no_claim_has_an_outcome(
    batch: ClaimBatch, tokenizer: ModelTokenizer
) -> None:
    class DyingOfIt(Engine):
        def score(self, prompts: Sequence[Prompt], tokens: Sequence[int]) -> list[Answer]:
            if len(prompts) == 1:
                raise EngineRequestError("the engine broke off")
            raise EngineRefused("too much")

    with pytest.raises(EngineRequestError, match="broke off"):
        infer(batch, tokenizer, DyingOfIt())


def test_a_prompt_is_compiled_once_for_all_its_batches(
    batch: ClaimBatch, definitions: dict[str, bytes]
) -> None:
    class Counting(ModelTokenizer):
        frames = 0

        def chat_frame(self) -> tuple[str, str] | None:
            self.frames += 1
            return super().chat_frame()

    tokenizer = Counting(definitions["byte-level"], {}, None)
    inference = Inference(
        tokenizer,
        Engine(),  # type: ignore[arg-type]
        max_model_tokens=1024,
        worker_id="w",
        device_name="d",
    )
    for _ in range(3):
        inference.infer(batch, 1)
    assert tokenizer.frames == 1


def test_many_prompts_do_not_fill_the_memory(
    batch: ClaimBatch, run: Run, tokenizer: ModelTokenizer
) -> None:
    inference = Inference(
        tokenizer,
        Engine(),  # type: ignore[arg-type]
        max_model_tokens=1024,
        worker_id="w",
        device_name="d",
    )
    for number in range(70):
        prompt = PromptSpec(name=f"prompt {number}")
        of_prompt = batch.model_copy(update={"run": run.model_copy(update={"prompt": prompt})})
        assert inference.infer(of_prompt, 1).verdicts is not None
    assert len(inference._prompts) <= 64
