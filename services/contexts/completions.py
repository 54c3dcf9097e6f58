"""The engine's protocol: OpenAI completions over a unix socket, one token, scored over labels."""

import contextlib
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from services.contracts.errors import EngineRequestError
from services.contracts.wire import first_fault
from services.imports import without

with without("click"):  # httpx would bring its own command along, and Rich for it
    import httpx
    import httpx_sse

_TOKEN = "token_id:"  # noqa: S105  (how vLLM spells a token id)
_LAST_EVENT = "[DONE]"
# An engine that is slow to tell of itself must not hold up whoever asks.
_METRICS_SECONDS = 0.5
_MOST_METRICS_BYTES = 4 * 1024 * 1024


class EngineRefused(EngineRequestError):
    """The engine understood the request and will never take it (HTTP 4xx)."""


class EngineSilent(EngineRequestError):
    """The engine lives and says nothing: it hangs."""


class Interrupted(EngineRequestError):
    """We broke off; the engine did nothing wrong."""


class _Logprobs(BaseModel):
    top_logprobs: list[dict[str, float | None]]


class _Choice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    index: int
    text: str
    finish_reason: str | None
    logprobs: _Logprobs | None


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says to one prompt: its own next token, and the label tokens' log
    probabilities (natural logarithm, over the whole vocabulary).
    """

    text: str
    logprobs: tuple[float, ...]


class CompletionClient:
    """Asks one engine. Safe to use from several threads at once."""

    def __init__(self, socket_path: Path, model_name: str, timeout_seconds: float) -> None:
        """`timeout_seconds` is how long the engine may be silent in the midst of its work."""
        self._socket_path = socket_path
        self._model_name = model_name
        self._timeout_seconds = timeout_seconds
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(
                uds=str(socket_path),
                limits=httpx.Limits(max_connections=None),
                # No TLS on a unix socket: the authorities that trust nothing are there at once.
                verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            ),
            trust_env=False,  # nor a proxy
            base_url="http://engine",
            timeout=httpx.Timeout(timeout_seconds, connect=5.0),
        )
        self._streams: set[socket.socket] = set()
        self._interrupted = False
        self._lock = threading.Lock()

    def close(self) -> None:
        self._http.close()

    def interrupt(self) -> None:
        """Break off every request, now and later. What was answered is not lost; the engine drops
        the rest when it sees its client go.
        """
        with self._lock:
            self._interrupted = True
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)

    def healthy(self) -> bool:
        """Whether the engine answers and has not failed. A hung engine may still say yes."""
        if not self._someone_listens():
            return False
        try:
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def metrics(self) -> str:
        """What the engine tells of itself, in the form that Prometheus reads; within a second.

        Raises EngineRequestError when it tells nothing, too much, or too slowly.
        """
        if not self._someone_listens():
            raise EngineRequestError("nobody listens at the engine's socket")
        deadline = time.monotonic() + _METRICS_SECONDS
        text = b""
        try:
            with self._http.stream("GET", "/metrics", timeout=_METRICS_SECONDS) as response:
                response.raise_for_status()
                for piece in response.iter_bytes():
                    text += piece
                    if len(text) > _MOST_METRICS_BYTES or time.monotonic() > deadline:
                        raise EngineRequestError("the engine's metrics are too large, or too slow")
        except (httpx.HTTPError, RuntimeError) as error:  # or we were closed meanwhile
            raise EngineRequestError(f"the engine told no metrics: {error!r}") from error
        return text.decode(errors="replace")

    def sleep(self) -> None:
        """Weights go to host memory, the key-value cache is dropped (vLLM's sleep mode, level 1).

        Raises EngineRequestError where the engine cannot.
        """
        self._post("/sleep?level=1")

    def wake(self) -> None:
        """Undo `sleep`. Raises EngineRequestError."""
        self._post("/wake_up")

    def _post(self, path: str) -> None:
        try:
            self._http.post(path).raise_for_status()
        except httpx.HTTPError as error:
            raise EngineRequestError(f"the engine refused {path}: {error}") from error

    def _someone_listens(self) -> bool:
        """Asked first, since httpcore leaves its socket open where nobody does."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_METRICS_SECONDS)  # its backlog may be full
            try:
                probe.connect(str(self._socket_path))
            except OSError:
                return False
        return True

    def score(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers with their prompts' numbers, each as soon as the engine has it.

        A prompt whose answer is no answer (aborted, scores missing or not numbers) has none.
        Raises EngineRefused before the first; Interrupted; EngineSilent or EngineRequestError when
        the engine fails. Those that came before are good all the same.
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
            # So that a worker that has to leave keeps what is answered already.
            "stream": True,
        }
        keys = [f"{_TOKEN}{token}" for token in tokens]
        try:
            # As fast as it gets: a batch holds thousands of token ids.
            with self._stream(to_json(request)) as response:
                for event in httpx_sse.EventSource(response).iter_sse():
                    if event.data == _LAST_EVENT:
                        return
                    for choice in _choices(event.data):
                        answer = _answer(choice, keys)
                        if answer is not None and 0 <= choice.index < len(prompts):
                            yield choice.index, answer
        except (httpx.HTTPError, httpx_sse.SSEError) as error:
            if self._interrupted:
                raise Interrupted("interrupted") from error
            if not isinstance(error, httpx.TimeoutException):
                raise EngineRequestError(f"the engine broke off: {error!r}") from error
            raise EngineSilent(
                f"the engine said nothing for {self._timeout_seconds:g} s "
                "(KEEPWARM_ENGINE_REQUEST_TIMEOUT_SECONDS)"
            ) from error
        raise EngineRequestError("the engine ended its answer half-way")

    @contextlib.contextmanager
    def _stream(self, content: bytes) -> Iterator[httpx.Response]:
        """The response to a request, its socket within reach of `interrupt`."""
        headers = {"Content-Type": "application/json"}
        with self._http.stream(
            "POST", "/v1/completions", content=content, headers=headers
        ) as response:
            if not response.is_success:
                text = response.read().decode(errors="replace")[:500]
                if response.is_client_error:
                    raise EngineRefused(f"the engine refused the request: {text}")
                raise EngineRequestError(f"the engine failed (HTTP {response.status_code}): {text}")
            stream = response.extensions["network_stream"].get_extra_info("socket")
            with self._lock:
                if self._interrupted:
                    raise Interrupted("interrupted")
                self._streams.add(stream)
            try:
                yield response
            finally:
                with self._lock:
                    self._streams.discard(stream)


def _choices(data: str) -> list[_Choice]:
    try:
        return _Event.model_validate_json(data).choices
    except ValidationError as error:
        # The engine reports a failure in the midst of a stream as an event of another form.
        raise EngineRequestError(
            f"not a completion ({first_fault(error)}): {data[:500]}"
        ) from error


def _answer(choice: _Choice, keys: Sequence[str]) -> Answer | None:
    # An aborted request can come back as HTTP 200.
    if choice.finish_reason not in ("stop", "length"):
        return None
    if choice.logprobs is None or not choice.logprobs.top_logprobs:
        return None
    given = choice.logprobs.top_logprobs[0]
    scores = [given.get(key) for key in keys]
    finite = tuple(score for score in scores if score is not None and math.isfinite(score))
    return Answer(choice.text, finite) if len(finite) == len(keys) else None
