"""Claims through an engine: each gets a verdict, dies with a reason, or stays without an answer."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from services.contexts.engine_client import Answer, CompletionClient, EngineRefused
from services.contracts import INVALID, Claim, DeadReason, PromptSpec, Verdict
from services.contracts.bounds import MAX_RAW_TEXT_CHARS
from services.contracts.errors import EngineRequestError, KeepwarmError, ModelError
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer

HARMLESS = Claim(claim_id="harmless", position=0, text="Water is wet.")
"""The canary: a claim that no engine fails with, if the engine is well."""

_MOST_PROMPTS = 64
_MOST_TRACE_CHARS = 4_000

T = TypeVar("T")
_DIGITS = 6


class WorkerFailure(KeepwarmError):
    """Our own code failed with the claims; the engine did nothing wrong. `trace` says where."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"the worker's own code failed ({type(error).__name__}); its log says where. Restart "
            "the worker, and report it if it fails again"
        )
        # It may quote a claim, so it is for a dead claim's detail and not for the log.
        self.trace = "".join(traceback.format_exception(error))[-_MOST_TRACE_CHARS:]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a claim can have no verdict on this context, whoever asks."""

    reason: DeadReason
    detail: str


@dataclass(frozen=True, slots=True)
class Declined:
    """Why this engine cannot answer a claim that another one may answer."""

    refusal: Refusal
    """What the claim dies of, if no other engine can answer it."""
    counts: bool
    """Whether the claim is at fault once a second engine says the same. If not, the engine is."""


@dataclass(slots=True)
class Outcome:
    """What became of the claims, by their place in the list that was asked about.

    A claim that is in none of the three has no answer: `failure` says why where the engine or the
    worker failed, and is None where the engine merely answered nonsense.
    """

    verdicts: dict[int, Verdict] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    failure: EngineRequestError | WorkerFailure | None = None
    engine_seconds: float = 0.0
    declined: dict[int, Declined] = field(default_factory=dict)

    def split(self, sizes: Sequence[int]) -> Iterator["Outcome"]:
        """The same for each of the lists, of these sizes, that were asked about as one."""
        share = self.engine_seconds / max(1, sum(sizes))
        first = 0
        for size in sizes:
            yield Outcome(
                _part(self.verdicts, first, size),
                _part(self.refused, first, size),
                self.failure,
                share * size,
                _part(self.declined, first, size),
            )
            first += size


def _part(whole: Mapping[int, T], first: int, size: int) -> dict[int, T]:
    return {n: whole[first + n] for n in range(size) if first + n in whole}


class Inference:
    """Puts claims to an engine. Safe to use from several threads at once."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        client: CompletionClient,
        *,
        max_model_tokens: int,
        engine_takes: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`max_model_tokens` is the context's. `engine_takes` says how many tokens the engine of
        the moment takes, which may be fewer; None where that is not known.
        """
        self._tokenizer = tokenizer
        self._client = client
        self._max_prompt_tokens = max_model_tokens - 1  # one is for the answer
        self._engine_takes = engine_takes
        self._prompts: dict[str, CompiledPrompt] = {}

    def infer(
        self,
        spec: PromptSpec,
        claims: Sequence[Claim],
        *,
        on_answer: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Ask about all claims at once. A failure of the engine or of our own code is part of the
        outcome, not raised: what was answered before it is good. `on_answer` is called at each
        answer.
        """
        outcome = Outcome()
        try:
            self._infer(spec, claims, outcome, on_answer)
        except BaseException as error:  # a panic of the tokenizer's is no Exception
            outcome.failure = WorkerFailure(error)
        return outcome

    def _infer(
        self,
        spec: PromptSpec,
        claims: Sequence[Claim],
        outcome: Outcome,
        on_answer: Callable[[], None],
    ) -> None:
        try:
            prompt = self._compiled(spec)
        except ModelError as error:
            refusal = Refusal(DeadReason.PROMPT_UNUSABLE, str(error))
            outcome.refused = dict.fromkeys(range(len(claims)), refusal)
            return
        if prompt.least_tokens > 2 * self._max_prompt_tokens:
            # Not copied for each of the claims, to be refused then: it may be megabytes.
            refusal = self._too_long(prompt.least_tokens)
            outcome.refused = dict.fromkeys(range(len(claims)), refusal)
            return
        prompts = prompt.encode(claims)
        engine_takes = self._engine_takes()
        for index, tokens in enumerate(prompts):
            if len(tokens) > self._max_prompt_tokens:
                outcome.refused[index] = self._too_long(len(tokens))
            elif engine_takes is not None and len(tokens) > engine_takes - 1:
                outcome.declined[index] = _too_long_here(len(tokens), engine_takes - 1)
        answers: dict[int, Answer] = {}
        started = time.monotonic()
        try:
            self._ask(
                [n for n in range(len(prompts)) if n not in outcome.refused | outcome.declined],
                prompts,
                prompt,
                answers,
                outcome.declined,
                on_answer,
            )
        except EngineRequestError as error:
            outcome.failure = error
        outcome.engine_seconds = time.monotonic() - started
        for index, answer in sorted(answers.items()):
            outcome.verdicts[index] = read_verdict(
                claims[index],
                Answer(answer.text, prompt.scores(answer.logprobs)),
                prompt.spec,
                len(prompts[index]),
            )

    def _too_long(self, tokens: int) -> Refusal:
        return Refusal(
            DeadReason.TOO_LONG,
            f"the prompt has {tokens:,} tokens; this context takes {self._max_prompt_tokens:,}. "
            "Shorten the evidence, or use --max-model-tokens",
        )

    def _ask(
        self,
        indexes: Sequence[int],
        prompts: Sequence[Sequence[int]],
        prompt: CompiledPrompt,
        answers: dict[int, Answer],
        declined: dict[int, Declined],
        on_answer: Callable[[], None],
    ) -> None:
        """Put the prompts at `indexes` to the engine. A request that it refuses is halved, until
        the prompt is found that it refuses; that one goes to `declined` and harms no other.
        """
        if not indexes:
            return
        try:
            asked = [prompts[index] for index in indexes]
            for place, answer in self._client.score(asked, prompt.label_tokens):
                if indexes[place] not in answers:
                    answers[indexes[place]] = answer
                    on_answer()
        except EngineRefused as error:
            if len(indexes) == 1:
                tokens = len(prompts[indexes[0]])
                declined[indexes[0]] = _refused_here(
                    error, tokens, canary_is_taken=self._takes_a_canary(prompt, tokens)
                )
                return
            middle = len(indexes) // 2
            for half in (indexes[:middle], indexes[middle:]):
                self._ask(half, prompts, prompt, answers, declined, on_answer)

    def _takes_a_canary(self, prompt: CompiledPrompt, tokens: int) -> bool:
        """Whether the engine takes a harmless prompt of so many tokens, with the same labels."""
        (harmless,) = prompt.encode([HARMLESS])
        canary = (harmless * (tokens // len(harmless) + 1))[:tokens]
        try:
            for _ in self._client.score([canary], prompt.label_tokens):
                pass
        except EngineRefused:
            return False
        return True

    def _compiled(self, spec: PromptSpec) -> CompiledPrompt:
        prompt = self._prompts.get(spec.prompt_id)
        if prompt is None:
            if len(self._prompts) >= _MOST_PROMPTS:
                self._prompts.clear()
            prompt = self._prompts[spec.prompt_id] = CompiledPrompt(spec, self._tokenizer)
        return prompt


def _too_long_here(tokens: int, takes: int) -> Declined:
    return Declined(
        Refusal(
            DeadReason.TOO_LONG,
            f"the prompt has {tokens:,} tokens, which this context takes, but this engine takes "
            f"only {takes:,}: its node sets a smaller --max-model-len. Correct "
            "KEEPWARM_ENGINE_ARGUMENTS there, then `keepwarm dead retry`",
        ),
        counts=False,
    )


def _refused_here(error: EngineRefused, tokens: int, *, canary_is_taken: bool) -> Declined:
    judged = (
        "It takes harmless text of the same length."
        if canary_is_taken
        else f"It refuses harmless text of the same length ({tokens:,} tokens) too, so its own "
        "settings are at fault: correct KEEPWARM_ENGINE_ARGUMENTS on its node, then `keepwarm dead "
        "retry`."
    )
    refusal = Refusal(DeadReason.ENGINE_REFUSED, f"{error}. {judged}")
    return Declined(refusal, counts=canary_is_taken)


def read_verdict(claim: Claim, answer: Answer, prompt: PromptSpec, prompt_tokens: int) -> Verdict:
    """The verdict on `claim`: the likeliest label, unless the labels were hardly likely at all.

    `probabilities` are the softmax over the label tokens' log probabilities; `mass` is the sum of
    their probabilities over the whole vocabulary. INVALID when a label has no score, or when the
    mass is under the prompt's `minimum_mass`.
    """
    scores = [score for score in answer.logprobs if score is not None]
    label, mass = INVALID, 0.0
    probabilities: tuple[float, ...] = ()
    if len(scores) == len(prompt.labels):
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        total = sum(weights)
        probabilities = tuple(round(weight / total, _DIGITS) for weight in weights)
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
        mass=round(mass, _DIGITS),
        raw_text=answer.text.replace("\0", "")[:MAX_RAW_TEXT_CHARS],
        prompt_tokens=prompt_tokens,
    )
