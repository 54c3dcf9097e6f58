import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.errors import EngineRequestError
from services.gpu_worker.completions import Answer, CompletionClient, EngineRefused, _answers

TOKENS = (11, 22)


def choice(index: int, /, *scores: float | None, **changes: Any) -> dict[str, Any]:
    logprobs = {f"token_id:{token}": score for token, score in zip(TOKENS, scores, strict=False)}
    return {
        "index": index,
        "text": f"word {index}",
        "finish_reason": "length",
        "logprobs": {"top_logprobs": [logprobs]},
        "stop_reason": None,
        **changes,
    }


def body(*choices: dict[str, Any]) -> bytes:
    return json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": choices}).encode()


def test_answers_come_in_the_order_of_their_prompts() -> None:
    answers = _answers(body(choice(1, -3.0, -4.0), choice(0, -1.0, -2.0)), 2, TOKENS)
    assert answers == [Answer("word 0", (-1.0, -2.0)), Answer("word 1", (-3.0, -4.0))]


def test_scores_come_in_the_order_of_the_tokens_whatever_else_is_there() -> None:
    scores = {"token_id:99": -0.1, "token_id:22": -2.0, "token_id:11": -1.0}
    answers = _answers(body(choice(0, logprobs={"top_logprobs": [scores]})), 1, TOKENS)
    assert answers[0].logprobs == (-1.0, -2.0)


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_an_answer_that_came_to_its_end_is_taken(finish_reason: str) -> None:
    assert _answers(body(choice(0, -1.0, -2.0, finish_reason=finish_reason)), 1, TOKENS)


@pytest.mark.parametrize("finish_reason", ["abort", "error", "tool_calls", "", None])
def test_an_aborted_request_is_no_answer_though_http_says_200(finish_reason: str | None) -> None:
    with pytest.raises(EngineRequestError, match=f"a request ended with {finish_reason!r}"):
        _answers(
            body(choice(0, -1.0, -2.0), choice(1, -1.0, -2.0, finish_reason=finish_reason)),
            2,
            TOKENS,
        )


@pytest.mark.parametrize(
    "indexes", [[], [0], [1], [0, 2], [-1, 0], [0, 0], [0, 1, 2], [0, 0, 1], [0, 1, 1]], ids=str
)
def test_anything_but_one_choice_a_prompt_is_no_answer(indexes: list[int]) -> None:
    with pytest.raises(EngineRequestError, match="choices came for 2 prompts"):
        _answers(body(*(choice(index, -1.0, -2.0) for index in indexes)), 2, TOKENS)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"{}",
        b'{"choices": null}',
        b'{"choices": [{}]}',
        body({"index": 0}),
        body(choice(0, text=None)),
        body(choice(0, index="zero")),
        body(choice(0, logprobs={"top_logprobs": [[]]})),
        body(choice(0, logprobs={"top_logprobs": [{"token_id:11": "high"}]})),
        b'{"error": {"message": "no"}}',
    ],
    ids=range(13),
)
def test_what_is_no_completion_is_no_answer(reply: bytes) -> None:
    with pytest.raises(EngineRequestError, match="not a completion: "):
        _answers(reply, 1, TOKENS)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"top_logprobs": []},
        {"top_logprobs": [{}]},
        {"top_logprobs": [{"token_id:11": None, "token_id:22": float("nan")}]},
        {"top_logprobs": [{"token_id:11": float("-inf"), "token_id:33": -1.0}]},
    ],
    ids=["none", "no position", "no score", "null and NaN", "infinite and missing"],
)
def test_a_score_that_is_missing_or_no_number_is_none(logprobs: dict[str, Any] | None) -> None:
    (answer,) = _answers(body(choice(0, logprobs=logprobs)), 1, TOKENS)
    assert answer == Answer("word 0", (None, None))


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_no_answer(reply: bytes) -> None:
    with pytest.raises(EngineRequestError):
        _answers(reply, 1, TOKENS)


# Over a socket.

Reply = Callable[[str, dict[str, Any]], tuple[int, bytes]]


class SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., CompletionClient]]:
    """A client of a server on a unix socket that replies as it is told."""
    servers: list[SocketServer] = []
    clients: list[CompletionClient] = []

    def serve(reply: Reply, timeout_seconds: float = 30) -> CompletionClient:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self.answer(json.loads(self.rfile.read(length)))

            def answer(self, request: dict[str, Any]) -> None:
                status, content = reply(self.path, request)
                if status:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        path = tmp_path / "e.sock"
        server = SocketServer(str(path), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        clients.append(CompletionClient(path, "ctx-1", timeout_seconds))
        return clients[-1]

    yield serve
    for client in clients:
        client.close()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_request_asks_for_one_token_scored_over_the_labels_exactly(
    served: Callable[..., CompletionClient],
) -> None:
    requests: list[tuple[str, dict[str, Any]]] = []

    def reply(path: str, request: dict[str, Any]) -> tuple[int, bytes]:
        requests.append((path, request))
        return 200, body(choice(0, -1.0, -2.0), choice(1, -1.0, -2.0))

    served(reply).score([[1, 2, 3], [4]], TOKENS)
    assert requests == [
        (
            "/v1/completions",
            {
                "model": "ctx-1",
                "prompt": [[1, 2, 3], [4]],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 2,
                "logprob_token_ids": [11, 22],
                "return_tokens_as_token_ids": True,
            },
        )
    ]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_request_that_the_engine_will_never_take_is_refused(
    status: int, served: Callable[..., CompletionClient]
) -> None:
    client = served(lambda *_: (status, b"the prompt is too long"))
    with pytest.raises(EngineRefused, match="refused the request: the prompt is too long"):
        client.score([[1]], TOKENS)


@pytest.mark.parametrize("status", [500, 503, 302])
def test_an_engine_that_failed_did_not_refuse(
    status: int, served: Callable[..., CompletionClient]
) -> None:
    client = served(lambda *_: (status, b"x" * 10_000))
    with pytest.raises(EngineRequestError, match=f"HTTP {status}") as failed:
        client.score([[1]], TOKENS)
    assert not isinstance(failed.value, EngineRefused)
    assert len(str(failed.value)) < 1_000


def test_an_engine_that_does_not_answer_by_the_deadline_failed(
    served: Callable[..., CompletionClient],
) -> None:
    answered = threading.Event()

    def reply(*_: Any) -> tuple[int, bytes]:
        answered.wait(30)
        return 0, b""

    client = served(reply, timeout_seconds=0.1)
    with pytest.raises(EngineRequestError, match="no answer from the engine by the deadline"):
        client.score([[1]], TOKENS)
    answered.set()


def test_an_engine_that_breaks_off_failed(served: Callable[..., CompletionClient]) -> None:
    client = served(lambda *_: (0, b""))
    with pytest.raises(EngineRequestError, match="the engine broke off"):
        client.score([[1]], TOKENS)


# httpcore leaves a socket that could not connect to Python's garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_an_engine_that_is_not_there_failed(tmp_path: Path) -> None:
    client = CompletionClient(tmp_path / "none.sock", "ctx-1", 5)
    with pytest.raises(EngineRequestError, match="the engine broke off"):
        client.score([[1]], TOKENS)
    assert not client.healthy()
    client.close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_health_is_what_the_engine_says(
    status: int, healthy: bool, served: Callable[..., CompletionClient]
) -> None:
    paths: list[str] = []

    def reply(path: str, _: dict[str, Any]) -> tuple[int, bytes]:
        paths.append(path)
        return status, b""

    assert served(reply).healthy() is healthy
    assert paths == ["/health"]


def test_several_threads_may_ask_at_once(served: Callable[..., CompletionClient]) -> None:
    def reply(_: str, request: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.01)
        return 200, body(choice(0, -float(request["prompt"][0][0]), -2.0))

    client = served(reply)
    found: dict[int, float | None] = {}

    def ask(number: int) -> None:
        found[number] = client.score([[number]], TOKENS)[0].logprobs[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: -number for number in range(8)}
