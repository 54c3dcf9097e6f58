"""The engine's protocol: OpenAI completions over a unix socket, one token, scored over labels."""

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from services.contracts.errors import EngineRequestError
from services.contracts.wire import first_fault

_TOKEN = "token_id:"  # noqa: S105  (how vLLM spells a token id)


class EngineRefused(EngineRequestError):
    """The engine understood the request and will never take it (HTTP 4xx)."""


class _Logprobs(BaseModel):
    top_logprobs: list[dict[str, float | None]]


class _Choice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    index: int
    text: str
    finish_reason: str | None
    logprobs: _Logprobs | None


class _Completion(BaseModel):
    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says to one prompt: its own next token, and the label tokens' log
    probabilities (natural logarithm, over the whole vocabulary; None where it gave none).
    """

    text: str
    logprobs: tuple[float | None, ...]


class CompletionClient:
    """Asks one engine. Safe to use from several threads at once."""

    def __init__(self, socket_path: Path, model_name: str, timeout_seconds: float) -> None:
        self._socket_path = socket_path
        self._model_name = model_name
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(
                uds=str(socket_path), limits=httpx.Limits(max_connections=None)
            ),
            base_url="http://engine",
            timeout=httpx.Timeout(timeout_seconds, connect=5.0),
        )

    def close(self) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Whether the engine answers and has not failed. A hung engine may still say yes."""
        if not self._someone_listens():
            return False
        try:
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _someone_listens(self) -> bool:
        """Asked first, since httpcore leaves its socket open where nobody does."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._socket_path))
            except OSError:
                return False
        return True

    def score(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[Answer]:
        """An answer per prompt, in order.

        Raises EngineRefused, or EngineRequestError when the engine failed, did not answer by the
        deadline, or answered what cannot be an answer.
        """
        request = {
            "model": self._model_name,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            # Top-k log probabilities could leave a label out; these are for the labels exactly.
            "logprobs": len(tokens),
            "logprob_token_ids": tokens,
            "return_tokens_as_token_ids": True,
        }
        try:
            response = self._http.post(
                "/v1/completions",
                # As fast as it gets: a batch holds thousands of token ids.
                content=to_json(request),
                headers={"Content-Type": "application/json"},
            )
        except httpx.TimeoutException as error:
            raise EngineRequestError("no answer from the engine by the deadline") from error
        except httpx.HTTPError as error:
            raise EngineRequestError(f"the engine broke off: {error!r}") from error
        if response.is_client_error:
            raise EngineRefused(f"the engine refused the request: {response.text[:500]}")
        if not response.is_success:
            raise EngineRequestError(
                f"the engine failed (HTTP {response.status_code}): {response.text[:500]}"
            )
        return _answers(response.content, len(prompts), tokens)


def _answers(body: bytes, prompts: int, tokens: Sequence[int]) -> list[Answer]:
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        raise EngineRequestError(f"not a completion: {first_fault(error)}") from error
    by_index = {choice.index: choice for choice in completion.choices}
    if len(completion.choices) != prompts or by_index.keys() != set(range(prompts)):
        raise EngineRequestError(
            f"{len(completion.choices)} choices came for {prompts} prompts, or not one for each"
        )
    keys = [f"{_TOKEN}{token}" for token in tokens]
    answers = []
    for index in range(prompts):
        choice = by_index[index]
        # An aborted request can come back as HTTP 200.
        if choice.finish_reason not in ("stop", "length"):
            raise EngineRequestError(f"a request ended with {choice.finish_reason!r}")
        scores: dict[str, Any] = {}
        if choice.logprobs is not None and choice.logprobs.top_logprobs:
            scores = choice.logprobs.top_logprobs[0]
        answers.append(Answer(choice.text, tuple(_finite(scores.get(key)) for key in keys)))
    return answers


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
