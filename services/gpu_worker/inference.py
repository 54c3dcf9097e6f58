"""One batch of claims through an engine: every claim gets a verdict or dies with a reason."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.contracts import ClaimBatch, DeadClaim, DeadReason, PromptSpec
from services.contracts.errors import ModelError
from services.contracts.verdicts import Verdict, VerdictBatch
from services.gpu_worker.completions import Answer, CompletionClient, EngineRefused
from services.gpu_worker.prompting import CompiledPrompt
from services.gpu_worker.tokenizer import ModelTokenizer
from services.gpu_worker.verdicts import read_verdict

_MOST_PROMPTS = 64


@dataclass(frozen=True)
class Outcome:
    """What became of a batch. Together the two hold each of its claims once."""

    verdicts: VerdictBatch | None
    dead: tuple[DeadClaim, ...]


@dataclass(frozen=True)
class _Refusal:
    reason: DeadReason
    detail: str


class Inference:
    """Turns batches into outcomes. Safe to use from several threads at once."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        client: CompletionClient,
        *,
        max_model_tokens: int,
        worker_id: str,
        device_name: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._client = client
        self._max_prompt_tokens = max_model_tokens - 1  # one is for the answer
        self._worker_id = worker_id
        self._device_name = device_name
        self._prompts: dict[str, CompiledPrompt] = {}

    def infer(self, batch: ClaimBatch, attempt: int) -> Outcome:
        """Raises EngineRequestError when the engine fails; then no claim has an outcome."""
        try:
            prompt = self._compiled(batch.run.prompt)
        except ModelError as error:
            refusal = _Refusal(DeadReason.PROMPT_UNUSABLE, str(error))
            all_claims = dict.fromkeys(range(len(batch.claims)), refusal)
            return self._outcome(batch, attempt, [], all_claims, 0.0)

        prompts = prompt.encode(batch.claims)
        refused = {
            index: _Refusal(
                DeadReason.TOO_LONG,
                f"the prompt has {len(tokens):,} tokens; this context takes "
                f"{self._max_prompt_tokens:,}. Shorten the evidence, or use --max-model-tokens",
            )
            for index, tokens in enumerate(prompts)
            if len(tokens) > self._max_prompt_tokens
        }
        started = time.monotonic()
        answers = self._ask(
            [index for index in range(len(prompts)) if index not in refused],
            prompts,
            prompt.label_tokens,
            refused,
        )
        seconds = time.monotonic() - started
        verdicts = [
            read_verdict(batch.claims[index], answer, prompt.spec, len(prompts[index]))
            for index, answer in answers
        ]
        return self._outcome(batch, attempt, verdicts, refused, seconds)

    def _ask(
        self,
        indexes: Sequence[int],
        prompts: Sequence[Sequence[int]],
        label_tokens: Sequence[int],
        refused: dict[int, _Refusal],
    ) -> list[tuple[int, Answer]]:
        """Answers to the prompts at `indexes`, in order. A request that the engine refuses is
        halved, until the prompt is found that it refuses; that one goes to `refused` and harms no
        other.
        """
        if not indexes:
            return []
        try:
            answers = self._client.score([prompts[index] for index in indexes], label_tokens)
        except EngineRefused as error:
            if len(indexes) == 1:
                refused[indexes[0]] = _Refusal(DeadReason.ENGINE_REFUSED, str(error))
                return []
            middle = len(indexes) // 2
            return [
                *self._ask(indexes[:middle], prompts, label_tokens, refused),
                *self._ask(indexes[middle:], prompts, label_tokens, refused),
            ]
        return list(zip(indexes, answers, strict=True))

    def _compiled(self, spec: PromptSpec) -> CompiledPrompt:
        if spec.prompt_id not in self._prompts:
            if len(self._prompts) >= _MOST_PROMPTS:
                self._prompts.clear()
            self._prompts[spec.prompt_id] = CompiledPrompt(spec, self._tokenizer)
        return self._prompts[spec.prompt_id]

    def _outcome(
        self,
        batch: ClaimBatch,
        attempt: int,
        verdicts: Sequence[Verdict],
        refused: dict[int, _Refusal],
        engine_seconds: float,
    ) -> Outcome:
        run_id = batch.run.run_id
        dead = tuple(
            DeadClaim(
                run_id=run_id,
                claim=batch.claims[index],
                reason=refusal.reason,
                detail=refusal.detail,
                worker_id=self._worker_id,
                attempt=attempt,
            )
            for index, refusal in refused.items()
        )
        if not verdicts:
            return Outcome(None, dead)
        return Outcome(
            VerdictBatch(
                run_id=run_id,
                batch_id=batch.batch_id,
                labels=batch.run.prompt.label_names,
                verdicts=tuple(verdicts),
                worker_id=self._worker_id,
                device=self._device_name,
                attempt=attempt,
                engine_seconds=engine_seconds,
            ),
            dead,
        )
