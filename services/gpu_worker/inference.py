"""Claims through an engine: each gets a verdict, dies with a reason, or stays without an answer."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from services.contexts.completions import Answer, CompletionClient, EngineRefused
from services.contracts import Claim, DeadReason, PromptSpec, Verdict
from services.contracts.errors import EngineRequestError, ModelError
from services.gpu_worker.prompting import CompiledPrompt
from services.gpu_worker.tokenizer import ModelTokenizer
from services.gpu_worker.verdicts import read_verdict

_MOST_PROMPTS = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a claim can have no verdict on this context, whoever asks."""

    reason: DeadReason
    detail: str


@dataclass(slots=True)
class Outcome:
    """What became of the claims, by their place in the list that was asked about.

    A claim that is in neither of the two has no answer: `failure` says why where the engine failed,
    and is None where it merely answered nonsense.
    """

    verdicts: dict[int, Verdict] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    failure: EngineRequestError | None = None
    engine_seconds: float = 0.0

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
            )
            first += size


def _part(whole: Mapping[int, T], first: int, size: int) -> dict[int, T]:
    return {n: whole[first + n] for n in range(size) if first + n in whole}


class Inference:
    """Puts claims to an engine. Safe to use from several threads at once."""

    def __init__(
        self, tokenizer: ModelTokenizer, client: CompletionClient, *, max_model_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._client = client
        self._max_prompt_tokens = max_model_tokens - 1  # one is for the answer
        self._prompts: dict[str, CompiledPrompt] = {}

    def infer(
        self,
        spec: PromptSpec,
        claims: Sequence[Claim],
        *,
        on_answer: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Ask about all claims at once. An engine's failure is part of the outcome, not raised:
        what was answered before it is good. `on_answer` is called at each answer.
        """
        outcome = Outcome()
        try:
            prompt = self._compiled(spec)
        except ModelError as error:
            refusal = Refusal(DeadReason.PROMPT_UNUSABLE, str(error))
            outcome.refused = dict.fromkeys(range(len(claims)), refusal)
            return outcome

        prompts = prompt.encode(claims)
        for index, tokens in enumerate(prompts):
            if len(tokens) > self._max_prompt_tokens:
                outcome.refused[index] = Refusal(
                    DeadReason.TOO_LONG,
                    f"the prompt has {len(tokens):,} tokens; this context takes "
                    f"{self._max_prompt_tokens:,}. Shorten the evidence, or use --max-model-tokens",
                )
        answers: dict[int, Answer] = {}
        started = time.monotonic()
        try:
            self._ask(
                [index for index in range(len(prompts)) if index not in outcome.refused],
                prompts,
                prompt.label_tokens,
                answers,
                outcome.refused,
                on_answer,
            )
        except EngineRequestError as error:
            outcome.failure = error
        outcome.engine_seconds = time.monotonic() - started
        outcome.verdicts = {
            index: read_verdict(
                claims[index],
                Answer(answer.text, prompt.scores(answer.logprobs)),
                prompt.spec,
                len(prompts[index]),
            )
            for index, answer in sorted(answers.items())
        }
        return outcome

    def _ask(
        self,
        indexes: Sequence[int],
        prompts: Sequence[Sequence[int]],
        label_tokens: Sequence[int],
        answers: dict[int, Answer],
        refused: dict[int, Refusal],
        on_answer: Callable[[], None],
    ) -> None:
        """Put the prompts at `indexes` to the engine. A request that it refuses is halved, until
        the prompt is found that it refuses; that one goes to `refused` and harms no other.
        """
        if not indexes:
            return
        try:
            asked = [prompts[index] for index in indexes]
            for place, answer in self._client.score(asked, label_tokens):
                if indexes[place] not in answers:
                    answers[indexes[place]] = answer
                    on_answer()
        except EngineRefused as error:
            if len(indexes) == 1:
                refused[indexes[0]] = Refusal(DeadReason.ENGINE_REFUSED, str(error))
                return
            middle = len(indexes) // 2
            for half in (indexes[:middle], indexes[middle:]):
                self._ask(half, prompts, label_tokens, answers, refused, on_answer)

    def _compiled(self, spec: PromptSpec) -> CompiledPrompt:
        prompt = self._prompts.get(spec.prompt_id)
        if prompt is None:
            if len(self._prompts) >= _MOST_PROMPTS:
                self._prompts.clear()
            prompt = self._prompts[spec.prompt_id] = CompiledPrompt(spec, self._tokenizer)
        return prompt
