"""Ask an engine about claims: each gets a verdict, a reason why it has none, or no answer."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from services.contexts.engine_client import Answer, EngineClient, EngineRefused
from services.contracts import INVALID, Claim, DeadReason, PromptSpec, Verdict
from services.contracts.bounds import MAX_RAW_TEXT_CHARS, MAX_REASONING_CHARS
from services.contracts.errors import EngineRequestError, KeepwarmError, ModelError
from services.contracts.prompts import Reasoning
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.telemetry import TimedLock

CANARY = Claim(claim_id="harmless", position=0, text="Water is wet.")
"""A claim that a healthy engine never fails with."""

_MAX_CACHED_PROMPTS = 64
_MAX_TRACE_CHARS = 4_000

T = TypeVar("T")
_DECIMALS = 6


class WorkerFailure(KeepwarmError):
    """The worker's own code failed with the claims, not the engine. `trace` is the traceback."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"the worker's own code failed ({type(error).__name__}); its log says where. Restart "
            "the worker, and report it if it fails again"
        )
        # It may quote a claim: it goes into a dead claim's detail, never into the log.
        self.trace = "".join(traceback.format_exception(error))[-_MAX_TRACE_CHARS:]


@dataclass(frozen=True, slots=True)
class DeadCause:
    """Why a claim is dead: no engine of this context can give it a verdict."""

    reason: DeadReason
    detail: str


@dataclass(frozen=True, slots=True)
class Declined:
    """Why this engine cannot answer a claim that another engine may answer."""

    cause: DeadCause
    """The cause of the dead claim, if no other engine can answer it."""
    counts_against_claim: bool
    """Whether the claim is at fault once other engines decline it for the same reason. If false,
    the engine is at fault."""
    out_of_memory: bool = False
    """The reason may be shared by all engines of small nodes, so more of them have to agree."""


@dataclass(slots=True)
class InferenceResult:
    """The results of a request, by the claim's index in the request.

    A claim that is not in `verdicts`, `dead` or `declined` has no answer. `failure` is the error
    of the engine or the worker; it is None if the engine only gave an unusable answer.
    """

    verdicts: dict[int, Verdict] = field(default_factory=dict)
    dead: dict[int, DeadCause] = field(default_factory=dict)
    failure: EngineRequestError | WorkerFailure | None = None
    engine_seconds: float = 0.0
    declined: dict[int, Declined] = field(default_factory=dict)

    def split(self, sizes: Sequence[int]) -> Iterator["InferenceResult"]:
        """One result for each of the lists, of these sizes, that were joined into the request."""
        share = self.engine_seconds / max(1, sum(sizes))
        first = 0
        for size in sizes:
            yield InferenceResult(
                _part(self.verdicts, first, size),
                _part(self.dead, first, size),
                self.failure,
                share * size,
                _part(self.declined, first, size),
            )
            first += size


def _part(whole: Mapping[int, T], first: int, size: int) -> dict[int, T]:
    return {n: whole[first + n] for n in range(size) if first + n in whole}


@dataclass(slots=True)
class _Request:
    """What the engine is asked about, by the claim's index; refused claims go to `declined`."""

    prompt: CompiledPrompt
    prompts: list[list[int]]
    declined: dict[int, Declined]


class Inference:
    """Asks an engine about claims. Safe to use from several threads at once."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        client: EngineClient,
        *,
        max_model_tokens: int,
        engine_max_tokens: Callable[[], int | None] = lambda: None,
        tokenizing: TimedLock | None = None,
    ) -> None:
        """`max_model_tokens` is the context's limit. `engine_max_tokens` returns the limit of the
        running engine, which may be lower; None if it is not known. `tokenizing` is held while a
        prompt is compiled or claims are encoded.
        """
        self._tokenizer = tokenizer
        self._client = client
        self._max_model_tokens = max_model_tokens
        self._engine_max_tokens = engine_max_tokens
        self._tokenizing = tokenizing or TimedLock()
        self._prompts: dict[str, CompiledPrompt] = {}

    def infer(
        self,
        spec: PromptSpec,
        claims: Sequence[Claim],
        *,
        on_answer: Callable[[], None] = lambda: None,
    ) -> InferenceResult:
        """Ask about all claims at once. `on_answer` is called at each answer.

        A failure of the engine or of our own code is part of the result and is not raised: answers
        before it are valid.
        """
        result = InferenceResult()
        try:
            self._infer(spec, claims, result, on_answer)
        except BaseException as error:  # a panic in the tokenizer is not an Exception
            result.failure = WorkerFailure(error)
        return result

    def _infer(
        self,
        spec: PromptSpec,
        claims: Sequence[Claim],
        result: InferenceResult,
        on_answer: Callable[[], None],
    ) -> None:
        try:
            with self._tokenizing:
                prompt = self._compiled(spec)
                max_tokens = max(0, self._max_model_tokens - prompt.reserved_tokens)
                # Else it is refused before it is encoded for each claim: it may have megabytes.
                fits = prompt.least_tokens <= 2 * max_tokens
                prompts = prompt.encode(claims) if fits else []
        except ModelError as error:
            cause = DeadCause(DeadReason.PROMPT_UNUSABLE, str(error))
            result.dead = dict.fromkeys(range(len(claims)), cause)
            return
        if not fits:
            cause = _too_long(prompt.least_tokens, max_tokens, spec.reasoning)
            result.dead = dict.fromkeys(range(len(claims)), cause)
            return
        engine_max_tokens = self._engine_max_tokens()
        for index, tokens in enumerate(prompts):
            if len(tokens) > max_tokens:
                result.dead[index] = _too_long(len(tokens), max_tokens, spec.reasoning)
            elif engine_max_tokens is not None:
                accepted = engine_max_tokens - prompt.reserved_tokens
                if len(tokens) > accepted:
                    result.declined[index] = _declined_too_long(len(tokens), accepted)
        request = _Request(prompt, prompts, result.declined)
        indexes = [n for n in range(len(prompts)) if n not in result.dead | result.declined]
        answers: dict[int, Answer] = {}
        written: dict[int, list[int]] = {}
        reasoning: dict[int, str] = {}
        started = time.monotonic()
        try:
            if spec.reasoning is not None:
                write = partial(
                    self._client.write,
                    max_tokens=spec.reasoning.max_tokens,
                    until=spec.reasoning.until,
                )
                self._ask(indexes, request, write, written, lambda: None)
                indexes = sorted(written)
                request.prompts = list(prompts)
                with self._tokenizing:
                    for index in indexes:
                        request.prompts[index], reasoning[index] = prompt.after_reasoning(
                            prompts[index], written[index]
                        )
            score = partial(self._client.score, tokens=prompt.label_tokens)
            self._ask(indexes, request, score, answers, on_answer)
        except EngineRequestError as error:
            result.failure = error
        result.engine_seconds = time.monotonic() - started
        for index, answer in sorted(answers.items()):
            result.verdicts[index] = read_verdict(
                claims[index],
                Answer(answer.text, prompt.scores(answer.logprobs)),
                prompt.spec,
                len(prompts[index]),
                reasoning.get(index),
                len(written.get(index, ())),
            )

    def _ask(
        self,
        indexes: Sequence[int],
        request: _Request,
        ask: Callable[[Sequence[Sequence[int]]], Iterator[tuple[int, T]]],
        answers: dict[int, T],
        on_answer: Callable[[], None],
    ) -> None:
        """Ask the engine about the prompts at `indexes`. A refused request is halved until the
        refused prompt is found, which goes to `declined`; the other prompts are answered.
        """
        if not indexes:
            return
        try:
            for position, answer in ask([request.prompts[index] for index in indexes]):
                if indexes[position] not in answers:
                    answers[indexes[position]] = answer
                    on_answer()
        except EngineRefused as error:
            if len(indexes) == 1:
                tokens = len(request.prompts[indexes[0]])
                request.declined[indexes[0]] = _declined_refused(
                    error, tokens, canary_accepted=self._accepts_canary(request.prompt, tokens, ask)
                )
                return
            middle = len(indexes) // 2
            for half in (indexes[:middle], indexes[middle:]):
                self._ask(half, request, ask, answers, on_answer)

    def _accepts_canary(
        self,
        prompt: CompiledPrompt,
        tokens: int,
        ask: Callable[[Sequence[Sequence[int]]], Iterator[tuple[int, T]]],
    ) -> bool:
        """Whether the engine accepts a canary prompt of this many tokens, asked in the same way."""
        with self._tokenizing:
            (encoded,) = prompt.encode([CANARY])
        canary = (encoded * (tokens // len(encoded) + 1))[:tokens]
        try:
            for _ in ask([canary]):
                pass
        except EngineRefused:
            return False
        return True

    def _compiled(self, spec: PromptSpec) -> CompiledPrompt:
        prompt = self._prompts.get(spec.prompt_id)
        if prompt is None:
            if len(self._prompts) >= _MAX_CACHED_PROMPTS:
                self._prompts.clear()
            prompt = self._prompts[spec.prompt_id] = CompiledPrompt(spec, self._tokenizer)
        return prompt


def _too_long(tokens: int, max_tokens: int, reasoning: Reasoning | None) -> DeadCause:
    after = "" if reasoning is None else f" before up to {reasoning.max_tokens:,} of reasoning"
    return DeadCause(
        DeadReason.TOO_LONG,
        f"the prompt has {tokens:,} tokens; this context accepts {max_tokens:,}{after}. "
        "Shorten the evidence, or use --max-model-tokens",
    )


def _declined_too_long(tokens: int, max_tokens: int) -> Declined:
    return Declined(
        DeadCause(
            DeadReason.TOO_LONG,
            f"the prompt has {tokens:,} tokens. The context accepts them, but this engine accepts "
            f"only {max_tokens:,}: its node sets a smaller --max-model-len. Correct "
            "KEEPWARM_ENGINE_ARGUMENTS there, then `keepwarm dead retry`",
        ),
        counts_against_claim=False,
    )


def _declined_refused(error: EngineRefused, tokens: int, *, canary_accepted: bool) -> Declined:
    conclusion = (
        "It accepts harmless text of the same length."
        if canary_accepted
        else f"It refuses harmless text of the same length ({tokens:,} tokens) too, so its own "
        "settings are at fault: correct KEEPWARM_ENGINE_ARGUMENTS on its node, then `keepwarm dead "
        "retry`."
    )
    cause = DeadCause(DeadReason.ENGINE_REFUSED, f"{error}. {conclusion}")
    return Declined(cause, counts_against_claim=canary_accepted)


def read_verdict(
    claim: Claim,
    answer: Answer,
    prompt: PromptSpec,
    prompt_tokens: int,
    reasoning: str | None = None,
    reasoning_tokens: int = 0,
) -> Verdict:
    """The verdict on `claim`: the likeliest label, or INVALID.

    `probabilities` are the softmax over the label tokens' log probabilities; `mass` is the sum of
    their probabilities over the whole vocabulary. The label is INVALID when a label has no score,
    or when the mass is less than the prompt's `minimum_mass`.
    """
    scores = [score for score in answer.logprobs if score is not None]
    label, mass = INVALID, 0.0
    probabilities: tuple[float, ...] = ()
    if len(scores) == len(prompt.labels):
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        total = sum(weights)
        probabilities = tuple(round(weight / total, _DECIMALS) for weight in weights)
        mass = min(1.0, total * math.exp(min(highest, 0.0)))
        if mass >= prompt.minimum_mass:
            label = prompt.label_names[scores.index(highest)]
    return Verdict(
        claim_id=claim.claim_id,
        position=claim.position,
        text=claim.text,
        gold=claim.gold,
        label=label,
        probabilities=probabilities,
        mass=round(mass, _DECIMALS),
        raw_text=answer.text.replace("\0", "")[:MAX_RAW_TEXT_CHARS],
        prompt_tokens=prompt_tokens,
        reasoning=None if reasoning is None else reasoning.replace("\0", "")[:MAX_REASONING_CHARS],
        reasoning_tokens=reasoning_tokens,
    )
