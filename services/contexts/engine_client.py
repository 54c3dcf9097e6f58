"""A client for the engine: OpenAI completions over a unix socket, one token scored over labels."""

import contextlib
import http.client
import math
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from services.contracts.errors import EngineRequestError
from services.contracts.wire import first_fault

_TOKEN = "token_id:"  # noqa: S105  (how vLLM spells a token id)
_FINISHED = ("stop", "length")
_DATA_PREFIX, _LAST_EVENT = b"data:", b"[DONE]"
# Errors of a connection that fails or breaks off; a time-out is an OSError as well.
_BROKEN = (OSError, http.client.HTTPException)
_HEALTH_SECONDS = 5.0
_SLICE_SECONDS = 0.5
# vLLM 0.32's answer when an adapter is loaded already.
_LOADED = "already been loaded"
_MAX_ERROR_BYTES = 2_000
_JSON = {"Content-Type": "application/json"}
# A slow engine must not block a scrape of our own metrics.
_METRICS_SECONDS = 0.5
_MAX_METRICS_BYTES, _PIECE_BYTES = 4 * 1024 * 1024, 64 * 1024


class EngineRefused(EngineRequestError):
    """The engine refuses the request for good (HTTP 4xx)."""


class EngineSilent(EngineRequestError):
    """The engine is there but sends nothing: it hangs."""


class Interrupted(EngineRequestError):
    """`interrupt` ended the request; the engine did not fail."""


class _Logprobs(BaseModel):
    top_logprobs: list[dict[str, float | None]]


class _Choice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    index: int
    text: str
    finish_reason: str | None
    logprobs: _Logprobs | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")

    max_model_len: int | None = None


class _Models(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: list[_Model]


@dataclass(frozen=True, slots=True)
class Answer:
    """The engine's answer to one prompt: its own next token, and the log probabilities of the label
    tokens (natural logarithm, over the whole vocabulary).
    """

    text: str
    logprobs: tuple[float, ...]


class _Socket(socket.socket):
    """A socket whose time-out counts in slices. If both sides were suspended meanwhile (SIGSTOP, a
    frozen cgroup), that counts as one slice and does not look like a hung engine.
    """

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__(socket.AF_UNIX)
        self._timeout_seconds = timeout_seconds

    def recv_into(self, *arguments: Any) -> int:
        self._wait_for(select.POLLIN)
        return super().recv_into(*arguments)

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data).cast("B")
        while view:
            self._wait_for(select.POLLOUT)
            view = view[super().send(view, flags | socket.MSG_DONTWAIT) :]

    def _wait_for(self, event: int) -> None:
        """Raises TimeoutError."""
        poll = select.poll()
        poll.register(self, event)
        left = self._timeout_seconds
        while not poll.poll(1000 * min(left, _SLICE_SECONDS)):
            left -= _SLICE_SECONDS
            if left <= 0:
                raise TimeoutError("timed out")


class _Connection(http.client.HTTPConnection):
    """A connection to a unix socket for one request: reuse would save no handshake."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        super().__init__("engine")
        self._path = path
        self._timeout_seconds = timeout_seconds

    def connect(self) -> None:
        self.sock = _Socket(self._timeout_seconds)
        # `connect` blocks while the engine's queue of connections is full.
        self.sock.settimeout(self._timeout_seconds)
        self.sock.connect(str(self._path))
        self.sock.settimeout(None)


class EngineClient:
    """A client of one engine. Safe to use from several threads at once."""

    def __init__(self, socket_path: Path, model_name: str, timeout_seconds: float) -> None:
        """`timeout_seconds` is how long the engine may send nothing during a request."""
        self._socket_path = socket_path
        self._model_name = model_name
        self._timeout_seconds = timeout_seconds
        self._streams: set[socket.socket] = set()
        self._interrupted = False
        self._lock = threading.Lock()

    def interrupt(self) -> None:
        """End every call of `score` and `write`, now and later. Answers that came before are kept.
        The engine drops the rest when the connection closes.
        """
        with self._lock:
            self._interrupted = True
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)

    def healthy(self) -> bool:
        """Whether the engine answers and has not failed. A hung engine may still answer this."""
        try:
            with self._request("GET", "/health", seconds=_HEALTH_SECONDS) as response:
                return response.status == HTTPStatus.OK
        except _BROKEN:
            return False

    def metrics(self) -> str:
        """The engine's own metrics, in Prometheus's text format; takes at most about a second.

        Raises EngineRequestError when there are none, too many, or when they come too slowly.
        """
        deadline = time.monotonic() + _METRICS_SECONDS
        text = b""
        try:
            with self._request("GET", "/metrics", seconds=_METRICS_SECONDS) as response:
                _raise_unless_success(response)
                while piece := response.read1(_PIECE_BYTES):
                    text += piece
                    if len(text) > _MAX_METRICS_BYTES or time.monotonic() > deadline:
                        raise EngineRequestError("the engine's metrics are too large, or too slow")
                if response.length:  # bytes that are missing; the library reports no error
                    raise EngineRequestError("the engine's metrics were cut off")
        except _BROKEN as error:
            raise EngineRequestError(f"the engine sent no metrics: {error!r}") from error
        return text.decode(errors="replace")

    def max_model_tokens(self) -> int | None:
        """The most tokens that it takes, prompt and answer together (vLLM's `max_model_len` from
        `/v1/models`); None if it does not report that.
        """
        try:
            with self._request("GET", "/v1/models") as response:
                _raise_unless_success(response)
                models = _Models.model_validate_json(response.read(_MAX_METRICS_BYTES))
        except (*_BROKEN, EngineRequestError, ValidationError):
            return None
        return min((m.max_model_len for m in models.data if m.max_model_len), default=None)

    def sleep(self) -> None:
        """Move the weights to host memory, drop the key-value cache (vLLM's sleep mode, level 1).

        Raises EngineRequestError if the engine cannot.
        """
        self._post("/sleep?level=1")

    def wake(self) -> None:
        """Undo `sleep`. Raises EngineRequestError."""
        self._post("/wake_up")

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load a LoRA adapter under this model name, unless it is loaded already.

        Raises EngineRequestError, with the engine's message, when it refuses the adapter.
        """
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        except EngineRefused as error:
            if _LOADED not in str(error):
                raise

    def _post(self, path: str, body: dict[str, str] | None = None) -> None:
        try:
            with self._request("POST", path, body=body) as response:
                _raise_unless_success(response)
        except _BROKEN as error:
            raise EngineRequestError(f"the engine's {path} failed: {error!r}") from error

    def score(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the index of a prompt and its answer, each as soon as the engine has it.

        Prompts and `tokens` are token ids; an answer has a log probability for each of `tokens`. A
        prompt without a usable answer (aborted, scores missing or not finite) is left out.
        Raises EngineRefused before the first answer; Interrupted; EngineSilent or
        EngineRequestError when the engine fails. Answers yielded before that are valid.
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
            # So that a worker that is preempted keeps the answers that it has.
            "stream": True,
        }
        keys = [f"{_TOKEN}{token}" for token in tokens]
        for choice in self._complete(request):
            answer = _answer(choice, keys)
            if answer is not None and 0 <= choice.index < len(prompts):
                yield choice.index, answer

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, until: str
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the index of a prompt and the tokens that the model writes after it, each as soon
        as the engine has them: the likeliest ones, at most `max_tokens`, up to the token that
        completes the text `until` or before the one that ends the model's turn.

        A prompt without a usable answer is left out. Raises as `score` does.
        """
        request = {
            "model": self._model_name,
            "prompt": prompts,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stop": [until],
            # `until` may be markup, such as the end of a model's thoughts.
            "skip_special_tokens": False,
            "return_token_ids": True,
            "stream": True,
        }
        written: dict[int, list[int]] = {index: [] for index in range(len(prompts))}
        for choice in self._complete(request):
            if choice.token_ids is None:
                raise EngineRequestError(
                    "the engine does not return token ids, which a prompt with `reasoning` needs; "
                    "use vLLM 0.32"
                )
            if choice.index not in written:
                continue
            tokens = written[choice.index]
            tokens += choice.token_ids
            if choice.finish_reason == "stop" and not isinstance(choice.stop_reason, str):
                del tokens[-1:]  # it ends the turn, and is no part of the text
            if choice.finish_reason in _FINISHED:
                yield choice.index, tokens

    def _complete(self, request: dict[str, Any]) -> Iterator[_Choice]:
        """The parts of a streamed completion. Raises as `score` does."""
        try:
            # `to_json` is the fastest encoder at hand: a batch holds thousands of token ids.
            with self._stream(to_json(request)) as response:
                for data in _events(response):
                    if data == _LAST_EVENT:
                        return
                    yield from _choices(data)
            # The library does not distinguish a stream that is cut off from one that has ended.
            raise http.client.IncompleteRead(b"")
        except _BROKEN as error:
            if self._interrupted:
                raise Interrupted("interrupted") from error
            if not isinstance(error, TimeoutError):
                raise EngineRequestError(f"the engine broke off: {error!r}") from error
            raise EngineSilent(
                f"the engine sent nothing for {self._timeout_seconds:g} s "
                "(KEEPWARM_ENGINE_REQUEST_TIMEOUT_SECONDS)"
            ) from error

    @contextlib.contextmanager
    def _stream(self, content: bytes) -> Iterator[http.client.HTTPResponse]:
        """The response to a completion request, which `interrupt` can end."""
        connection = _Connection(self._socket_path, self._timeout_seconds)
        with contextlib.closing(connection):
            connection.connect()
            stream = connection.sock
            with self._lock:
                if self._interrupted:
                    raise Interrupted("interrupted")
                self._streams.add(stream)
            try:
                connection.request("POST", "/v1/completions", content, _JSON)
                with connection.getresponse() as response:
                    _raise_unless_success(response)
                    yield response
            finally:
                with self._lock:
                    self._streams.discard(stream)

    @contextlib.contextmanager
    def _request(
        self,
        method: str,
        path: str,
        *,
        seconds: float | None = None,
        body: dict[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """The response to a request; `seconds` is how long the engine may send nothing."""
        connection = _Connection(self._socket_path, seconds or self._timeout_seconds)
        with contextlib.closing(connection):
            if body is None:
                connection.request(method, path)
            else:
                connection.request(method, path, to_json(body), _JSON)
            with connection.getresponse() as response:
                yield response


def _raise_unless_success(response: http.client.HTTPResponse) -> None:
    if response.status == HTTPStatus.OK:
        return
    text = response.read(_MAX_ERROR_BYTES).decode(errors="replace")[:500]
    if response.status == HTTPStatus.NOT_FOUND:
        # The prompts are not the cause: an engine that lost an adapter loads it at its next start.
        raise EngineRequestError(f"the engine does not have what was asked for: {text}")
    if HTTPStatus.BAD_REQUEST <= response.status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise EngineRefused(f"the engine refused the request: {text}")
    raise EngineRequestError(f"the engine failed (HTTP {response.status}): {text}")


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of the events of a stream. vLLM's data is JSON without line breaks."""
    kind = response.headers.get_content_type()
    if kind != "text/event-stream":
        raise http.client.HTTPException(f"{kind} instead of an event stream")
    try:
        for line in response:
            if not line.endswith(b"\n"):  # the stream was cut off in the middle of a line
                raise http.client.IncompleteRead(line)
            if line.startswith(_DATA_PREFIX):
                yield line.removeprefix(_DATA_PREFIX).strip()
    except ValueError as error:
        raise http.client.HTTPException(f"not a chunk of a stream: {error}") from error


def _choices(data: bytes) -> list[_Choice]:
    try:
        return _Event.model_validate_json(data).choices
    except ValidationError as error:
        # The engine reports a failure during a stream as an event of another form.
        raise EngineRequestError(
            f"not a completion ({first_fault(error)}): {data[:500].decode(errors='replace')}"
        ) from error


def _answer(choice: _Choice, keys: Sequence[str]) -> Answer | None:
    # An aborted request can come back as HTTP 200.
    if choice.finish_reason not in _FINISHED:
        return None
    if choice.logprobs is None or not choice.logprobs.top_logprobs:
        return None
    given = choice.logprobs.top_logprobs[0]
    scores = [given.get(key) for key in keys]
    finite = tuple(score for score in scores if score is not None and math.isfinite(score))
    return Answer(choice.text, finite) if len(finite) == len(keys) else None
