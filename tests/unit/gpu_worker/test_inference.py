from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contexts.engine_client import Answer, EngineRefused, EngineSilent, Interrupted
from services.contracts import Claim, DeadReason, Label, PromptSpec, Verdict
from services.contracts.bounds import MAX_REASONING_CHARS
from services.contracts.errors import EngineRequestError
from services.contracts.prompts import Reasoning
from services.gpu_worker.inference import (
    DeadCause,
    Declined,
    Inference,
    InferenceResult,
    WorkerFailure,
)
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from tests.unit.gpu_worker.conftest import verdict

Prompt = Sequence[int]
PROMPT = PromptSpec()
CLAIMS = [
    Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.", evidence=f"Evidence {n}.")
    for n in range(7)
]


class Engine:
    """Stands for an engine: scores every prompt alike, refuses those that it is told to, and
    answers in an order of its own.
    """

    def __init__(self, refuses: Callable[[Prompt], bool] = lambda _: False) -> None:
        self._refuses = refuses
        self.requests: list[list[Prompt]] = []
        self.tokens: set[tuple[int, ...]] = set()

    def score(
        self, prompts: Sequence[Prompt], tokens: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        self.requests.append(list(prompts))
        self.tokens.add(tuple(tokens))
        if any(self._refuses(prompt) for prompt in prompts):
            raise EngineRefused("the engine refused the request: never")
        scores = tuple(-1.0 - index for index in range(len(tokens)))
        for index in reversed(range(len(prompts))):
            yield index, Answer(f"True {len(prompts[index])}", scores)


def inference(tokenizer: ModelTokenizer, engine: Engine, max_model_tokens: int = 1024) -> Inference:
    return Inference(tokenizer, engine, max_model_tokens=max_model_tokens)  # type: ignore[arg-type]


def infer(
    claims: Sequence[Claim],
    tokenizer: ModelTokenizer,
    engine: Engine,
    *,
    prompt: PromptSpec = PROMPT,
    max_model_tokens: int = 1024,
) -> InferenceResult:
    return inference(tokenizer, engine, max_model_tokens).infer(prompt, claims)


def encoded(claims: Sequence[Claim], tokenizer: ModelTokenizer) -> list[list[int]]:
    return CompiledPrompt(PROMPT, tokenizer).encode(claims)


def indexes_of(result: InferenceResult) -> tuple[list[int], list[int]]:
    """Of the claims with a verdict, and of those that are refused."""
    return list(result.verdicts), sorted(result.dead)


def test_every_claim_gets_its_own_verdict_whatever_order_the_answers_come_in(
    tokenizer: ModelTokenizer,
) -> None:
    engine = Engine()
    result = infer(CLAIMS, tokenizer, engine)
    assert indexes_of(result) == (list(range(7)), [])
    assert engine.requests == [encoded(CLAIMS, tokenizer)]
    assert result.failure is None
    assert result.engine_seconds >= 0
    for index, one in result.verdicts.items():
        tokens = len(engine.requests[0][index])
        assert (one.claim_id, one.position) == (f"c{index}", index)
        assert (one.prompt_tokens, one.raw_text) == (tokens, f"True {tokens}")


def test_the_engine_scores_the_tokens_of_the_prompts_labels(tokenizer: ModelTokenizer) -> None:
    engine = Engine()
    infer(CLAIMS, tokenizer, engine)
    assert engine.tokens == {CompiledPrompt(PROMPT, tokenizer).label_tokens}


def claims_of(*texts: str) -> list[Claim]:
    return [
        Claim(claim_id=f"c{n}", position=n, text=text, gold="SUPPORTS")
        for n, text in enumerate(texts)
    ]


def test_a_claim_that_is_too_long_is_refused_and_harms_no_other(tokenizer: ModelTokenizer) -> None:
    mixed = claims_of("Short.", "long " * 1_500, "Short too.")
    engine = Engine()
    result = infer(mixed, tokenizer, engine)
    assert indexes_of(result) == ([0, 2], [1])
    cause = result.dead[1]
    length = len(encoded(mixed, tokenizer)[1])
    assert cause.reason is DeadReason.TOO_LONG
    assert f"the prompt has {length:,} tokens; this context accepts 1,023" in cause.detail
    assert "--max-model-tokens" in cause.detail
    assert all(len(prompt) < 1_024 for request in engine.requests for prompt in request)


@pytest.mark.parametrize(("slack", "refused"), [(0, [0]), (1, [])])
def test_the_longest_prompt_leaves_space_for_the_answers_one_token(
    slack: int, refused: list[int], tokenizer: ModelTokenizer
) -> None:
    one = claims_of("Short.")
    length = len(encoded(one, tokenizer)[0])
    result = infer(one, tokenizer, Engine(), max_model_tokens=length + slack)
    assert indexes_of(result)[1] == refused


def test_when_every_claim_is_too_long_the_engine_is_not_asked(tokenizer: ModelTokenizer) -> None:
    engine = Engine()
    result = infer(CLAIMS, tokenizer, engine, max_model_tokens=16)
    assert indexes_of(result) == ([], list(range(7)))
    assert engine.requests == []


@given(poison=st.sets(st.integers(0, 6)))
def test_a_refused_request_is_halved_down_to_the_claims_that_poison_it(
    poison: set[int], tokenizer: ModelTokenizer
) -> None:
    prompts = encoded(CLAIMS, tokenizer)
    poisoned = [prompts[index] for index in poison]
    engine = Engine(lambda prompt: prompt in poisoned)
    result = infer(CLAIMS, tokenizer, engine)
    assert indexes_of(result) == ([n for n in range(7) if n not in poison], [])
    # No death yet: another engine may take them. This one takes others of the same length.
    assert sorted(result.declined) == sorted(poison)
    for declined in result.declined.values():
        assert declined.counts_against_claim and declined.cause.reason is DeadReason.ENGINE_REFUSED
        assert "the engine refused the request: never" in declined.cause.detail
        assert "It accepts harmless text of the same length." in declined.cause.detail
    assert [verdict.claim_id for verdict in result.verdicts.values()] == [
        f"c{n}" for n in range(7) if n not in poison
    ]
    assert result.failure is None
    assert len(engine.requests) <= 2 * 7 - 1 + len(poison)


def test_a_refusal_by_an_engine_that_refuses_harmless_text_too_does_not_count(
    tokenizer: ModelTokenizer,
) -> None:
    mixed = claims_of("Short.", "long " * 100, "Short too.")
    length = len(encoded(mixed, tokenizer)[1])
    result = infer(mixed, tokenizer, Engine(lambda prompt: len(prompt) >= length))
    assert indexes_of(result) == ([0, 2], [])
    (declined,) = result.declined.values()
    assert not declined.counts_against_claim
    assert "refuses harmless text of the same length" in declined.cause.detail
    assert "KEEPWARM_ENGINE_ARGUMENTS" in declined.cause.detail


@pytest.mark.parametrize("engine_max_tokens", [None, 100, 1024])
def test_what_is_too_long_for_the_engine_alone_is_left_to_another_and_not_asked(
    engine_max_tokens: int | None, tokenizer: ModelTokenizer
) -> None:
    mixed = claims_of("Short.", "long " * 100, "long " * 1_500)
    engine = Engine()
    asked = Inference(
        tokenizer,
        engine,  # type: ignore[arg-type]
        max_model_tokens=1024,
        engine_max_tokens=lambda: engine_max_tokens,
    )
    result = asked.infer(PROMPT, mixed)
    if engine_max_tokens != 100:
        assert (indexes_of(result), result.declined) == (([0, 1], [2]), {})
        return
    assert indexes_of(result) == ([0], [2])
    (declined,) = result.declined.values()
    length = len(encoded(mixed, tokenizer)[1])
    assert not declined.counts_against_claim and declined.cause.reason is DeadReason.TOO_LONG
    assert f"{length:,} tokens. The context accepts them, but this engine accepts only 99" in (
        declined.cause.detail
    )
    assert all(len(prompt) < 100 for request in engine.requests for prompt in request)


def test_the_longest_prompt_that_the_engine_accepts_leaves_space_for_the_answer(
    tokenizer: ModelTokenizer,
) -> None:
    one = claims_of("Short.")
    length = len(encoded(one, tokenizer)[0])
    for slack, declined in ((0, [0]), (1, [])):
        asked = Inference(
            tokenizer,
            Engine(),  # type: ignore[arg-type]
            max_model_tokens=1024,
            engine_max_tokens=lambda takes=length + slack: takes,  # type: ignore[misc]
        )
        assert list(asked.infer(PROMPT, one).declined) == declined


def test_a_prompt_that_is_far_too_long_by_itself_is_not_copied_for_each_claim(
    tokenizer: ModelTokenizer,
) -> None:
    long = PromptSpec(instructions="many words " * 5_000)
    asked = inference(tokenizer, Engine())
    compiled = asked._compiled(long)
    compiled.encode = lambda _: pytest.fail("it was encoded")  # type: ignore[method-assign]
    result = asked.infer(long, CLAIMS)
    assert indexes_of(result) == ([], list(range(7)))
    assert result.dead[0].reason is DeadReason.TOO_LONG


def test_a_label_word_that_cannot_be_distinguished_refuses_the_claims_and_not_the_worker(
    tokenizer: ModelTokenizer,
) -> None:
    labels = (Label(name="A", word="Unknown"), Label(name="B", word="Unknown"))
    engine = Engine()
    result = infer(CLAIMS, tokenizer, engine, prompt=PromptSpec(name="mine", labels=labels))
    assert indexes_of(result) == ([], list(range(7)))
    assert all(r.reason is DeadReason.PROMPT_UNUSABLE for r in result.dead.values())
    assert all("'Unknown' (A) and 'Unknown' (B)" in r.detail for r in result.dead.values())
    assert engine.requests == []


# When the engine fails.


class FailingAfter(Engine):
    """Answers so many prompts of each request, and fails then."""

    def __init__(self, answers: int, failure: EngineRequestError) -> None:
        super().__init__()
        self._answers = answers
        self._failure = failure

    def score(
        self, prompts: Sequence[Prompt], tokens: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        for number, found in enumerate(super().score(prompts, tokens)):
            if number == self._answers:
                raise self._failure
            yield found


@given(
    answers=st.integers(0, 6), kind=st.sampled_from([EngineRequestError, EngineSilent, Interrupted])
)
def test_answers_before_the_engine_failed_are_kept_and_the_failure_is_in_the_outcome(
    answers: int, kind: type[EngineRequestError], tokenizer: ModelTokenizer
) -> None:
    failure = kind("gone")
    result = infer(CLAIMS, tokenizer, FailingAfter(answers, failure))
    assert indexes_of(result) == (list(range(7 - answers, 7)), [])
    assert result.failure is failure


def test_too_long_claims_are_refused_though_the_engine_fails_with_the_others(
    tokenizer: ModelTokenizer,
) -> None:
    mixed = claims_of("Short.", "long " * 1_500, "Short too.")
    result = infer(mixed, tokenizer, FailingAfter(0, EngineSilent("hangs")))
    assert indexes_of(result) == ([], [1])
    assert isinstance(result.failure, EngineSilent)


def test_a_claim_with_an_unusable_answer_has_no_answer_and_nothing_failed(
    tokenizer: ModelTokenizer,
) -> None:
    class Mumbling(Engine):
        def score(
            self, prompts: Sequence[Prompt], tokens: Sequence[int]
        ) -> Iterator[tuple[int, Answer]]:
            yield from (found for found in super().score(prompts, tokens) if found[0] != 3)

    result = infer(CLAIMS, tokenizer, Mumbling())
    assert indexes_of(result) == ([0, 1, 2, 4, 5, 6], [])
    assert result.failure is None


def test_of_two_answers_to_one_prompt_the_first_counts(tokenizer: ModelTokenizer) -> None:
    class Repeating(Engine):
        def score(
            self, prompts: Sequence[Prompt], tokens: Sequence[int]
        ) -> Iterator[tuple[int, Answer]]:
            for text in ("first", "second"):
                for index, found in super().score(prompts, tokens):
                    yield index, Answer(text, found.logprobs)

    result = infer(CLAIMS, tokenizer, Repeating())
    assert {verdict.raw_text for verdict in result.verdicts.values()} == {"first"}


def test_an_engine_that_fails_while_a_request_is_halved_leaves_the_rest_unanswered(
    tokenizer: ModelTokenizer,
) -> None:
    prompts = encoded(CLAIMS, tokenizer)

    class DyingOfIt(Engine):
        def score(
            self, prompts_: Sequence[Prompt], tokens: Sequence[int]
        ) -> Iterator[tuple[int, Answer]]:
            if len(prompts_) == 7:
                raise EngineRefused("too much")
            if prompts[6] in prompts_:
                raise EngineRequestError("the engine broke off")
            yield from super().score(prompts_, tokens)

    result = infer(CLAIMS, tokenizer, DyingOfIt())
    assert indexes_of(result) == ([0, 1, 2], [])
    assert "broke off" in str(result.failure)


def test_a_prompt_is_compiled_once_for_all_its_batches(definitions: dict[str, bytes]) -> None:
    class Counting(ModelTokenizer):
        frames = 0

        def chat_frame(self, variables: Mapping[str, Any] | None = None) -> tuple[str, str] | None:
            self.frames += 1
            return super().chat_frame(variables)

    tokenizer = Counting(definitions["byte-level"], {}, None)
    asked = inference(tokenizer, Engine())
    for _ in range(3):
        asked.infer(PROMPT, CLAIMS)
    assert tokenizer.frames == 1


def test_many_prompts_do_not_fill_the_memory(tokenizer: ModelTokenizer) -> None:
    asked = inference(tokenizer, Engine())
    for number in range(70):
        assert asked.infer(PromptSpec(name=f"prompt {number}"), CLAIMS).verdicts
    assert len(asked._prompts) <= 64


# When our own code fails.


class PanicException(BaseException):
    """What a panic of the tokenizer's raises: no Exception (PyO3)."""


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, PanicException])
def test_a_failure_of_our_own_is_in_the_outcome_with_its_traceback_and_is_not_raised(
    error: type[BaseException], tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object) -> None:
        raise error("a secret claim")

    monkeypatch.setattr(CompiledPrompt, "encode", encode)
    result = infer(CLAIMS, tokenizer, Engine())
    assert indexes_of(result) == ([], [])
    assert isinstance(result.failure, WorkerFailure)
    assert "a secret claim" in result.failure.trace and "in encode" in result.failure.trace
    assert "secret" not in str(result.failure)  # which is logged


def test_an_answer_that_we_stumble_over_takes_no_verdict_away_that_was_read_before_it(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(claim: Claim, *_: object) -> Verdict:
        if claim.claim_id == "c3":
            raise ZeroDivisionError
        return verdict(claim)

    monkeypatch.setattr("services.gpu_worker.inference.read_verdict", read)
    result = infer(CLAIMS, tokenizer, Engine())
    assert indexes_of(result) == ([0, 1, 2], [])
    assert isinstance(result.failure, WorkerFailure)


# Several lists that were asked about as one.


@given(
    st.lists(
        st.lists(st.sampled_from(("verdict", "refused", "declined", "open")), max_size=5),
        min_size=1,
    )
)
def test_an_outcome_is_split_as_the_claims_were_put_together(fates: list[list[str]]) -> None:
    asked = [
        (Claim(claim_id=f"{part}/{index}", position=0, text="A claim."), fate)
        for part, some in enumerate(fates)
        for index, fate in enumerate(some)
    ]
    whole = InferenceResult(
        {n: verdict(claim) for n, (claim, fate) in enumerate(asked) if fate == "verdict"},
        {
            n: DeadCause(DeadReason.TOO_LONG, claim.claim_id)
            for n, (claim, fate) in enumerate(asked)
            if fate == "refused"
        },
        EngineSilent("hangs"),
        8.0,
        {
            n: Declined(DeadCause(DeadReason.TOO_LONG, claim.claim_id), counts_against_claim=False)
            for n, (claim, fate) in enumerate(asked)
            if fate == "declined"
        },
    )
    parts = list(whole.split([len(some) for some in fates]))
    for number, (part, some) in enumerate(zip(parts, fates, strict=True)):
        assert {index: given.claim_id for index, given in part.verdicts.items()} == {
            index: f"{number}/{index}" for index, fate in enumerate(some) if fate == "verdict"
        }
        assert {index: given.detail for index, given in part.dead.items()} == {
            index: f"{number}/{index}" for index, fate in enumerate(some) if fate == "refused"
        }
        assert {index: given.cause.detail for index, given in part.declined.items()} == {
            index: f"{number}/{index}" for index, fate in enumerate(some) if fate == "declined"
        }
        assert part.failure is whole.failure
        assert part.engine_seconds * len(asked) == pytest.approx(8 * len(some))


# Prompts that reason first.

REASONING = PromptSpec(
    template="Evidence: {evidence}\nClaim: {claim}\nReasoning:",
    chat=False,
    reasoning=Reasoning(max_tokens=60),
)


class WritingEngine(Engine):
    """Writes a text after each prompt; `fails` says at which requests it fails, counted from 0."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        text: str = " It says so.\nAnswer: True",
        refuses: Callable[[Prompt], bool] = lambda _: False,
        fails: int = -1,
    ) -> None:
        super().__init__(refuses)
        (self.written,) = tokenizer.encode_plain([text])
        self.fails = fails

    def write(
        self, prompts: Sequence[Prompt], *, max_tokens: int, until: str
    ) -> Iterator[tuple[int, list[int]]]:
        assert (max_tokens, until) == (60, "Answer:")
        self.requests.append(list(prompts))
        if any(self._refuses(prompt) for prompt in prompts):
            raise EngineRefused("the engine refused the request: never")
        for index in reversed(range(len(prompts))):
            if self.fails == 0 and index == 2:
                raise EngineRequestError("the engine broke off")
            yield index, list(self.written)

    def score(
        self, prompts: Sequence[Prompt], tokens: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        for index, answer in super().score(prompts, tokens):
            if self.fails == 1 and index == 2:
                raise EngineRequestError("the engine broke off")
            yield index, answer


def test_the_engine_writes_first_and_the_labels_are_scored_after_it(
    tokenizer: ModelTokenizer,
) -> None:
    engine = WritingEngine(tokenizer)
    answered: list[None] = []
    result = inference(tokenizer, engine).infer(
        REASONING, CLAIMS, on_answer=lambda: answered.append(None)
    )
    first, second = engine.requests
    compiled = CompiledPrompt(REASONING, tokenizer)
    assert first == compiled.encode(CLAIMS)
    assert second == [compiled.after_reasoning(ids, engine.written)[0] for ids in first]
    assert engine.tokens == {compiled.label_tokens}
    assert result.failure is None and len(answered) == len(CLAIMS) == len(result.verdicts)
    for index, one in result.verdicts.items():
        assert one.prompt_tokens == len(first[index])
        assert (one.reasoning, one.reasoning_tokens) == (" It says so.\n", len(engine.written))


def test_a_verdict_without_reasoning_has_no_field_for_it(tokenizer: ModelTokenizer) -> None:
    (one,) = infer(CLAIMS[:1], tokenizer, Engine()).verdicts.values()
    assert not {"reasoning", "reasoning_tokens"} & one.model_dump(mode="json").keys()


@pytest.mark.parametrize("fails", [0, 1])
def test_a_failure_in_either_request_is_the_claims_failure(
    fails: int, tokenizer: ModelTokenizer
) -> None:
    engine = WritingEngine(tokenizer, fails=fails)
    result = infer(CLAIMS, tokenizer, engine, prompt=REASONING)
    assert str(result.failure) == "the engine broke off"
    # What was only written is lost; what was scored is an answer.
    assert sorted(result.verdicts) == ([] if fails == 0 else [3, 4, 5, 6])
    assert len(engine.requests) == fails + 1
    assert not result.dead and not result.declined


def test_an_engine_that_refuses_a_claim_is_asked_to_write_for_the_others(
    tokenizer: ModelTokenizer,
) -> None:
    compiled = CompiledPrompt(REASONING, tokenizer)
    refused = compiled.encode(CLAIMS[3:4])[0]
    engine = WritingEngine(tokenizer, refuses=lambda prompt: list(prompt) == refused)
    result = infer(CLAIMS, tokenizer, engine, prompt=REASONING)
    assert (sorted(result.verdicts), list(result.declined)) == ([0, 1, 2, 4, 5, 6], [3])
    assert result.declined[3].counts_against_claim


@pytest.mark.parametrize(("slack", "dead"), [(0, [0]), (1, [])])
def test_a_prompt_leaves_space_for_the_reasoning(
    slack: int, dead: list[int], tokenizer: ModelTokenizer
) -> None:
    compiled = CompiledPrompt(REASONING, tokenizer)
    length = len(compiled.encode(CLAIMS[:1])[0])
    most = length + compiled.reserved_tokens - 1 + slack
    engine = WritingEngine(tokenizer, text="x" * 60)
    result = infer(CLAIMS[:1], tokenizer, engine, prompt=REASONING, max_model_tokens=most)
    assert sorted(result.dead) == dead
    if dead:
        assert "before up to 60 of reasoning" in result.dead[0].detail
    else:
        assert max(len(prompt) for asked in engine.requests for prompt in asked) < most


def test_long_reasoning_is_cut_and_cleaned_to_fit_the_wire(tokenizer: ModelTokenizer) -> None:
    engine = WritingEngine(tokenizer, text="\0long " * MAX_REASONING_CHARS)
    (one,) = infer(CLAIMS[:1], tokenizer, engine, prompt=REASONING).verdicts.values()
    assert one.reasoning is not None and len(one.reasoning) == MAX_REASONING_CHARS
    assert "\0" not in one.reasoning
