import itertools
import json
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contexts.engine_client import (
    Answer,
    EngineClient,
    EngineRefused,
    EngineSilent,
    Interrupted,
    _answer,
    _choices,
)
from services.contracts.errors import EngineRequestError

TOKENS = (11, 22)
KEYS = ("token_id:11", "token_id:22")
GENEROUS_SECONDS = 30.0


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


def body(*choices: dict[str, Any]) -> str:
    return json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": choices})


def answer(one: dict[str, Any]) -> Answer | None:
    (parsed,) = _choices(body(one).encode())
    return _answer(parsed, KEYS)


# One event.


def test_an_event_may_hold_several_choices_or_none() -> None:
    assert [c.index for c in _choices(body(choice(1, -3.0), choice(0, -1.0)).encode())] == [1, 0]
    assert _choices(body().encode()) == []


def test_scores_come_in_the_order_of_the_tokens_whatever_else_is_there() -> None:
    scores = {"token_id:99": -0.1, "token_id:22": -2.0, "token_id:11": -1.0}
    assert answer(choice(0, logprobs={"top_logprobs": [scores]})) == Answer("word 0", (-1.0, -2.0))


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_an_answer_that_came_to_its_end_is_taken(finish_reason: str) -> None:
    assert answer(choice(0, -1.0, -2.0, finish_reason=finish_reason)) is not None


@pytest.mark.parametrize("finish_reason", ["abort", "error", "tool_calls", "", None])
def test_an_aborted_request_is_no_answer_though_its_status_is_200(
    finish_reason: str | None,
) -> None:
    assert answer(choice(0, -1.0, -2.0, finish_reason=finish_reason)) is None


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"top_logprobs": []},
        {"top_logprobs": [{}]},
        {"top_logprobs": [{"token_id:11": -1.0, "token_id:22": None}]},
        {"top_logprobs": [{"token_id:11": -1.0, "token_id:22": float("nan")}]},
        {"top_logprobs": [{"token_id:11": float("-inf"), "token_id:22": -1.0}]},
        {"top_logprobs": [{"token_id:11": -1.0, "token_id:33": -1.0}]},
    ],
    ids=["none", "no position", "no score", "null", "NaN", "infinite", "missing"],
)
def test_a_choice_without_a_number_for_every_label_is_no_answer(
    logprobs: dict[str, Any] | None,
) -> None:
    assert answer(choice(0, logprobs=logprobs)) is None


@pytest.mark.parametrize(
    "data",
    [
        "",
        "<html>",
        "null",
        "[]",
        "{}",
        '{"choices": null}',
        '{"choices": [{}]}',
        body({"index": 0}),
        body(choice(0, text=None)),
        body(choice(0, index="zero")),
        body(choice(0, logprobs={"top_logprobs": [[]]})),
        body(choice(0, logprobs={"top_logprobs": [{"token_id:11": "high"}]})),
        '{"error": {"message": "no"}}',
    ],
    ids=range(13),
)
def test_an_event_that_is_no_completion_is_a_failure(data: str) -> None:
    with pytest.raises(EngineRequestError, match="not a completion "):
        _choices(data.encode())


@given(st.text(max_size=100))
def test_arbitrary_text_is_no_completion(data: str) -> None:
    with pytest.raises(EngineRequestError):
        _choices(data.encode())


# Over a socket.


def event(*choices: dict[str, Any]) -> bytes:
    return f"data: {body(*choices)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


class BreakOff(Exception):
    """The engine is gone in the midst of its reply."""


Reply = Callable[[str, dict[str, Any]], tuple[int, Iterable[bytes]]]
Serve = Callable[..., EngineClient]


def streamed(*pieces: bytes) -> Reply:
    return lambda *_: (200, pieces)


class SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    # With Python's five, a slow machine refuses some of eight clients that come at once.
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients leave when they please."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serve]:
    """A client of a server on a unix socket that replies as it is told: 200 as a stream."""
    servers: list[SocketServer] = []

    def serve(reply: Reply, timeout_seconds: float = GENEROUS_SECONDS) -> EngineClient:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self.answer(json.loads(self.rfile.read(length)))

            def answer(self, request: dict[str, Any]) -> None:
                try:
                    status, pieces = reply(self.path, request)
                    if status == 200 and self.command == "POST":
                        self.stream(pieces)
                    else:
                        content = b"".join(pieces)
                        self.send_response(status)
                        self.send_header("Content-Length", str(len(content)))
                        self.end_headers()
                        self.wfile.write(content)
                except BreakOff:
                    self.close_connection = True

            def stream(self, pieces: Iterable[bytes]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *_: object) -> None:
                pass

        path = tmp_path / "e.sock"
        server = SocketServer(str(path), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return EngineClient(path, "ctx-1", timeout_seconds)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@contextmanager
def breaking_off(path: Path, says: bytes, asked_until: bytes) -> Iterator[EngineClient]:
    """A client of an engine that says this to one request, to the byte, and is gone."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                asked = b""
                while not asked.endswith(asked_until):
                    asked += connection.recv(4096)
                connection.sendall(says)

        threading.Thread(target=serve, daemon=True).start()
        yield EngineClient(path, "ctx-1", GENEROUS_SECONDS)


def ask(client: EngineClient, prompts: int = 3) -> tuple[dict[int, Answer], Exception | None]:
    """What was answered, and what ended it before its time."""
    found: dict[int, Answer] = {}
    try:
        for index, one in client.score([[number] for number in range(prompts)], TOKENS):
            found[index] = one
    except EngineRequestError as error:
        return found, error
    return found, None


def failure_of(client: EngineClient, prompts: list[list[int]]) -> Exception | None:
    try:
        list(client.score(prompts, TOKENS))
    except EngineRequestError as error:
        return error
    return None


def test_a_request_asks_for_one_token_scored_over_the_labels_exactly(served: Serve) -> None:
    requests: list[tuple[str, dict[str, Any]]] = []

    def reply(path: str, request: dict[str, Any]) -> tuple[int, Iterable[bytes]]:
        requests.append((path, request))
        return 200, (event(choice(0, -1.0, -2.0)), event(choice(1, -1.0, -2.0)), DONE)

    assert len(list(served(reply).score([[1, 2, 3], [4]], TOKENS))) == 2
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
                "stream": True,
            },
        )
    ]


def test_answers_come_with_the_numbers_of_their_prompts_in_whatever_order(served: Serve) -> None:
    client = served(
        streamed(
            event(choice(2, -5.0, -6.0), choice(0, -1.0, -2.0)), event(choice(1, -3, -4)), DONE
        )
    )
    assert ask(client) == (
        {
            2: Answer("word 2", (-5.0, -6.0)),
            0: Answer("word 0", (-1.0, -2.0)),
            1: Answer("word 1", (-3.0, -4.0)),
        },
        None,
    )


def test_an_answer_is_there_as_soon_as_the_engine_has_it(served: Serve) -> None:
    seen = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield event(choice(1, -1.0, -2.0))
        assert seen.wait(GENEROUS_SECONDS)
        yield event(choice(0, -1.0, -2.0))
        yield DONE

    answers = served(lambda *_: (200, pieces())).score([[1], [2]], TOKENS)
    assert next(answers)[0] == 1
    seen.set()
    assert [index for index, _ in answers] == [0]


def test_an_event_may_come_in_pieces(served: Serve) -> None:
    whole = b": a comment\n\n" + event(choice(0, -1.0, -2.0)) + DONE
    client = served(streamed(*(whole[n : n + 1] for n in range(len(whole)))))
    assert ask(client, 1) == ({0: Answer("word 0", (-1.0, -2.0))}, None)


def test_nonsense_about_one_prompt_is_no_answer_and_the_others_have_theirs(served: Serve) -> None:
    client = served(
        streamed(
            event(choice(0, -1.0, float("nan"))),
            event(choice(1, -1.0), choice(2, -1.0, -2.0)),
            event(choice(3, -1.0, -2.0, finish_reason="abort")),
            event(choice(4, -1.0, -2.0)),
            DONE,
        )
    )
    found, error = ask(client, 6)
    assert (sorted(found), error) == ([2, 4], None)


@pytest.mark.parametrize("index", [-1, 3, 10**9])
def test_an_answer_to_a_prompt_that_nobody_asked_is_left_out(index: int, served: Serve) -> None:
    client = served(streamed(event(choice(index, -1.0, -2.0), choice(0, -1.0, -2.0)), DONE))
    found, error = ask(client)
    assert (sorted(found), error) == ([0], None)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_engine_will_never_take_is_refused(status: int, served: Serve) -> None:
    client = served(lambda *_: (status, [b"the prompt is too long"]))
    with pytest.raises(EngineRefused, match="refused the request: the prompt is too long"):
        list(client.score([[1]], TOKENS))


def test_an_engine_that_lost_what_it_is_asked_for_did_not_refuse_the_prompts(
    served: Serve,
) -> None:
    client = served(lambda *_: (404, [b"The model `ctx-1` does not exist."]))
    with pytest.raises(EngineRequestError, match="does not have what was asked for") as failed:
        list(client.score([[1]], TOKENS))
    assert type(failed.value) is EngineRequestError


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"Success: LoRA adapter 'ctx-1' added successfully.", None),
        (400, b"The lora adapter 'ctx-1' has already been loaded.", None),
        (400, b"Both 'lora_name' and 'lora_path' must be provided.", "must be provided"),
        (404, b"No adapter found for /a", "No adapter found for /a"),
        (500, b"LoRA rank 128 is greater than max_lora_rank 64.", "LoRA rank 128 is greater"),
    ],
)
def test_an_adapter_is_loaded_or_the_error_has_the_engines_reason(
    status: int, body: bytes, says: str | None, served: Serve
) -> None:
    client = served(lambda *_: (status, [body]))
    if says is None:
        client.load_adapter("ctx-1", Path("/a"))
    else:
        with pytest.raises(EngineRequestError, match=says):
            client.load_adapter("ctx-1", Path("/a"))


@pytest.mark.parametrize("status", [500, 503, 302])
def test_an_engine_that_failed_did_not_refuse(status: int, served: Serve) -> None:
    client = served(lambda *_: (status, [b"x" * 10_000]))
    with pytest.raises(EngineRequestError, match=f"HTTP {status}") as failed:
        list(client.score([[1]], TOKENS))
    assert type(failed.value) is EngineRequestError
    assert len(str(failed.value)) < 1_000


def test_an_error_in_mid_stream_is_a_failure_and_what_came_before_is_good(served: Serve) -> None:
    error = b'data: {"error": {"message": "EngineCore died, %b"}}\n\n' % (b"x" * 10_000)
    found, failure = ask(served(streamed(event(choice(1, -1.0, -2.0)), error, DONE)))
    assert sorted(found) == [1]
    assert type(failure) is EngineRequestError
    assert "EngineCore died" in str(failure)
    assert len(str(failure)) < 1_000


def test_a_stream_that_ends_without_its_last_event_is_a_failure(served: Serve) -> None:
    found, failure = ask(served(streamed(event(choice(1, -1.0, -2.0)))))
    assert sorted(found) == [1]
    assert type(failure) is EngineRequestError
    assert "the engine broke off: IncompleteRead" in str(failure)


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_an_engine_that_breaks_off_failed_and_what_came_before_is_good(
    pieces: int, served: Serve
) -> None:
    def broken() -> Iterator[bytes]:
        for index in range(pieces):
            yield event(choice(index, -1.0, -2.0))
        raise BreakOff

    found, failure = ask(served(lambda *_: (200, broken())))
    assert sorted(found) == list(range(pieces))
    assert type(failure) is EngineRequestError
    assert "the engine broke off" in str(failure)


@pytest.mark.parametrize(
    "rest",
    [
        b'a\r\ndata: {"ch\r\n',  # at the border of a chunk, in the midst of a line
        b"a\r\ndata",
        b"-5\r\n",
        b"nonsense\r\n",
    ],
    ids=["line", "chunk", "negative", "no size"],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_stream_that_breaks_off_anywhere_is_the_engines_failure_or_our_interruption(
    rest: bytes, interrupted: bool, tmp_path: Path
) -> None:
    first = event(choice(0, -1.0, -2.0))
    says = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n%b" % (len(first), first, rest)
    )
    with breaking_off(tmp_path / "e.sock", says, asked_until=b"}") as client:
        answers = client.score([[1], [2]], TOKENS)
        assert next(answers)[0] == 0
        if interrupted:
            client.interrupt()
        with pytest.raises(EngineRequestError) as failed:
            next(answers)
    assert type(failed.value) is (Interrupted if interrupted else EngineRequestError)
    assert interrupted or "the engine broke off" in str(failed.value)


def test_an_engine_that_breaks_off_before_its_first_answer_failed(served: Serve) -> None:
    def reply(*_: object) -> tuple[int, Iterable[bytes]]:
        raise BreakOff

    with pytest.raises(EngineRequestError, match="the engine broke off"):
        list(served(reply).score([[1]], TOKENS))


@pytest.mark.parametrize(
    ("status", "what"),
    [(200, "the engine broke off: IncompleteRead"), (201, r"failed \(HTTP 201\)")],
)
def test_a_reply_that_is_no_stream_of_events_is_a_failure(
    status: int, what: str, served: Serve
) -> None:
    client = served(lambda *_: (status, [body(choice(0, -1.0, -2.0)).encode()]))
    with pytest.raises(EngineRequestError, match=what):
        list(client.score([[1]], TOKENS))


@pytest.mark.parametrize(("answers", "seconds"), [(None, 0.5), (0, 0.5), (2, 5)])
def test_an_engine_that_falls_silent_hangs_and_what_came_before_is_good(
    answers: int | None, seconds: float, served: Serve
) -> None:
    over = threading.Event()

    def pieces() -> Iterator[bytes]:
        if answers:
            yield event(*(choice(index, -1.0, -2.0) for index in range(answers)))
        over.wait(GENEROUS_SECONDS)

    def reply(*_: object) -> tuple[int, Iterable[bytes]]:
        if answers is None:  # not even the head of a reply
            over.wait(GENEROUS_SECONDS)
            raise BreakOff
        return 200, pieces()

    found, failure = ask(served(reply, timeout_seconds=seconds))
    over.set()
    assert sorted(found) == list(range(answers or 0))
    assert isinstance(failure, EngineSilent)
    assert f"sent nothing for {seconds} s (KEEPWARM_ENGINE_REQUEST_TIMEOUT_SECONDS)" in str(failure)


ASKS = """
import sys
from pathlib import Path
from services.contexts.engine_client import EngineClient

client = EngineClient(Path(sys.argv[1]), "ctx-1", float(sys.argv[2]))
print(len(list(client.score([[1]], (11, 22)))), flush=True)
"""


def test_the_time_in_which_we_were_stopped_is_no_silence_of_the_engines(
    served: Serve, repository: Path
) -> None:
    asked, resumed = threading.Event(), threading.Event()

    def reply(*_: object) -> tuple[int, Iterable[bytes]]:
        asked.set()
        assert resumed.wait(GENEROUS_SECONDS)
        time.sleep(0.5)  # it was stopped as well, and has not done yet
        return 200, (event(choice(0, -1.0, -2.0)), DONE)

    socket_path = served(reply)._socket_path
    with subprocess.Popen(
        [sys.executable, "-c", ASKS, str(socket_path), "4"],
        cwd=repository,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert asked.wait(GENEROUS_SECONDS)
        worker.send_signal(signal.SIGSTOP)
        time.sleep(5)  # longer than the silence that is allowed
        worker.send_signal(signal.SIGCONT)
        resumed.set()
        assert worker.communicate(timeout=GENEROUS_SECONDS)[0] == "1\n"


def test_an_engine_that_takes_a_large_request_in_slowly_has_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "e.sock"
    prompts = [list(range(10_000)) for _ in range(100)]  # more than a socket holds
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        failure: list[Exception | None] = []
        client = EngineClient(path, "ctx-1", GENEROUS_SECONDS)
        asking = threading.Thread(target=lambda: failure.append(failure_of(client, prompts)))
        asking.start()
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request:
            head = dict(
                line.decode().strip().lower().split(": ", 1)
                for line in itertools.takewhile(lambda line: line != b"\r\n", request)
                if b": " in line
            )
            body = json.loads(request.read(int(head["content-length"])))
        asking.join(GENEROUS_SECONDS)
    assert body["prompt"] == prompts
    assert isinstance(failure[0], EngineRequestError)


def test_an_engine_that_takes_no_request_in_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "e.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = EngineClient(path, "ctx-1", 0.5)
        prompts = [list(range(10_000)) for _ in range(100)]
        assert isinstance(failure_of(client, prompts), EngineSilent)


def test_an_engine_that_is_slow_but_speaks_does_not_hang(served: Serve) -> None:
    # All of it takes longer than the silence that is allowed.
    def pieces() -> Iterator[bytes]:
        for index in range(7):
            time.sleep(1)
            yield event(choice(index, -1.0, -2.0))
        yield DONE

    found, failure = ask(served(lambda *_: (200, pieces()), timeout_seconds=5), 7)
    assert (len(found), failure) == (7, None)


def test_an_engine_that_is_not_there_failed(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none.sock", "ctx-1", 5)
    with pytest.raises(EngineRequestError, match="the engine broke off"):
        list(client.score([[1]], TOKENS))
    assert not client.healthy()


# Breaking off ourselves.


def test_interrupting_ends_every_request_and_what_was_answered_is_not_lost(served: Serve) -> None:
    over = threading.Event()
    waiting = threading.Semaphore(0)
    requests = 4

    def pieces() -> Iterator[bytes]:
        yield event(choice(1, -1.0, -2.0))
        waiting.release()
        over.wait(GENEROUS_SECONDS)

    client = served(lambda *_: (200, pieces()))
    got: list[tuple[dict[int, Answer], Exception | None]] = []
    seen = threading.Semaphore(0)

    def follow() -> None:
        found: dict[int, Answer] = {}
        try:
            for index, one in client.score([[1], [2]], TOKENS):
                found[index] = one
                seen.release()
        except EngineRequestError as error:
            got.append((found, error))

    threads = [threading.Thread(target=follow, daemon=True) for _ in range(requests)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert seen.acquire(timeout=GENEROUS_SECONDS)
    client.interrupt()
    for thread in threads:
        thread.join(GENEROUS_SECONDS)
    over.set()
    assert len(got) == requests
    for found, error in got:
        assert sorted(found) == [1]
        assert type(error) is Interrupted


def test_a_request_is_interrupted_that_the_engine_has_not_begun_to_answer(served: Serve) -> None:
    asked, over = threading.Event(), threading.Event()

    def reply(*_: object) -> tuple[int, Iterable[bytes]]:
        asked.set()
        over.wait(2 * GENEROUS_SECONDS)
        raise BreakOff

    client = served(reply, timeout_seconds=2 * GENEROUS_SECONDS)
    got: list[Exception | None] = []
    thread = threading.Thread(target=lambda: got.append(ask(client)[1]), daemon=True)
    thread.start()
    assert asked.wait(GENEROUS_SECONDS)
    client.interrupt()
    thread.join(GENEROUS_SECONDS)
    over.set()
    assert [type(error) for error in got] == [Interrupted]


def test_after_an_interruption_nobody_asks_any_more(served: Serve) -> None:
    client = served(streamed(event(choice(0, -1.0, -2.0)), DONE))
    assert ask(client, 1)[1] is None
    client.interrupt()
    client.interrupt()
    found, error = ask(client, 1)
    assert found == {}
    assert type(error) is Interrupted


def test_interrupting_a_client_that_nobody_uses_is_quiet(served: Serve) -> None:
    client = served(lambda *_: (200, []))
    client.interrupt()
    assert client.healthy()


def test_whoever_loses_interest_leaves_nothing_open(served: Serve) -> None:
    client = served(streamed(event(choice(0, -1.0, -2.0)), event(choice(1, -1.0, -2.0)), DONE))
    answers = client.score([[1], [2]], TOKENS)
    assert next(answers)[0] == 0
    answers.close()  # type: ignore[attr-defined]
    assert client._streams == set()
    assert ask(client, 2)[1] is None


# Health, and several at once.


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_health_is_the_engines_status(status: int, healthy: bool, served: Serve) -> None:
    paths: list[str] = []

    def reply(path: str, _: dict[str, Any]) -> tuple[int, Iterable[bytes]]:
        paths.append(path)
        return status, []

    assert served(reply).healthy() is healthy
    assert paths == ["/health"]


def test_several_threads_may_ask_at_once(served: Serve) -> None:
    def reply(_: str, request: dict[str, Any]) -> tuple[int, Iterable[bytes]]:
        time.sleep(0.01)
        return 200, (event(choice(0, -float(request["prompt"][0][0]), -2.0)), DONE)

    client = served(reply)
    found: dict[int, float] = {}

    def ask_one(number: int) -> None:
        ((_, one),) = client.score([[number]], TOKENS)
        found[number] = one.logprobs[0]

    threads = [threading.Thread(target=ask_one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: -number for number in range(8)}


# What the engine tells of itself.


@pytest.mark.parametrize(
    ("status", "told", "tokens"),
    [
        (200, b'{"object":"list","data":[{"id":"x","max_model_len":512,"root":"m"}]}', 512),
        (200, b'{"data":[{"id":"x","max_model_len":512},{"id":"adapter","parent":"x"}]}', 512),
        (200, b'{"data":[{"id":"x","max_model_len":null}]}', None),
        (200, b'{"data":[]}', None),
        (200, b"{", None),
        (404, b"", None),  # another engine than vLLM, or an old one
    ],
)
def test_the_engine_reports_how_many_tokens_it_takes_or_that_is_not_known(
    status: int, told: bytes, tokens: int | None, served: Serve
) -> None:
    paths: list[str] = []

    def reply(path: str, _: dict[str, Any]) -> tuple[int, Iterable[bytes]]:
        paths.append(path)
        return status, [told]

    assert served(reply).max_model_tokens() == tokens
    assert paths == ["/v1/models"]


def test_of_an_engine_that_is_gone_it_is_not_known(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none.sock", "ctx-1", GENEROUS_SECONDS)
    assert client.max_model_tokens() is None


def test_the_engines_metrics_are_as_it_tells_them(
    served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.contexts.engine_client._METRICS_SECONDS", GENEROUS_SECONDS)
    paths: list[str] = []

    def reply(path: str, _: dict[str, Any]) -> tuple[int, Iterable[bytes]]:
        paths.append(path)
        return 200, [b"vllm:x 1\n"]

    assert served(reply).metrics() == "vllm:x 1\n"
    assert paths == ["/metrics"]


def test_metrics_that_do_not_come_are_a_failure(served: Serve) -> None:
    over = threading.Event()

    def silent(*_: object) -> tuple[int, Iterable[bytes]]:
        over.wait(GENEROUS_SECONDS)
        raise BreakOff

    with pytest.raises(EngineRequestError, match="sent no metrics"):
        served(silent).metrics()
    over.set()


def test_metrics_that_break_off_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.contexts.engine_client._METRICS_SECONDS", GENEROUS_SECONDS)
    says = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nvllm:x 1\n"
    with (
        breaking_off(tmp_path / "e.sock", says, asked_until=b"\r\n\r\n") as client,
        pytest.raises(EngineRequestError, match="metrics were cut off"),
    ):
        client.metrics()


@pytest.mark.parametrize(
    ("status", "text"), [(500, b""), (404, b"vllm:x 1\n"), (200, b"x" * (4 * 1024 * 1024 + 1))]
)
def test_metrics_that_are_none_or_too_many_are_a_failure(
    status: int, text: bytes, served: Serve
) -> None:
    with pytest.raises(EngineRequestError):
        served(lambda *_: (status, [text])).metrics()


def test_an_engine_that_is_not_there_tells_no_metrics(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none.sock", "ctx-1", 5)
    with pytest.raises(EngineRequestError, match="sent no metrics: FileNotFoundError"):
        client.metrics()


# Text before an answer.


def tokens(index: int, *ids: int, **changes: Any) -> dict[str, Any]:
    part = {"index": index, "text": "x", "token_ids": ids, "finish_reason": None}
    return {**part, "logprobs": None, "stop_reason": None, **changes}


def write(client: EngineClient, prompts: int = 2) -> dict[int, list[int]]:
    return dict(client.write([[1]] * prompts, max_tokens=9, until="Answer:"))


def test_what_is_written_is_collected_until_each_text_ends(served: Serve) -> None:
    asked: list[dict[str, Any]] = []

    def reply(_: str, request: dict[str, Any]) -> tuple[int, Iterable[bytes]]:
        asked.append(request)
        return 200, [
            event(tokens(0, 5), tokens(1, 7, 8)),
            event(tokens(1, 9, finish_reason="length")),
            event(tokens(0, 6, finish_reason="stop", stop_reason="Answer:")),
            DONE,
        ]

    assert write(served(reply)) == {0: [5, 6], 1: [7, 8, 9]}
    (request,) = asked
    assert (request["max_tokens"], request["stop"], request["temperature"]) == (9, ["Answer:"], 0)
    assert request["return_token_ids"] is True and request["skip_special_tokens"] is False
    assert "logprobs" not in request


@pytest.mark.parametrize("stop_reason", [None, 2])
def test_the_token_that_ends_the_models_turn_is_no_part_of_the_text(
    stop_reason: int | None, served: Serve
) -> None:
    last = tokens(0, 5, 2, finish_reason="stop", stop_reason=stop_reason)
    assert write(served(streamed(event(last), DONE)), 1) == {0: [5]}


def test_a_text_that_was_aborted_is_left_out(served: Serve) -> None:
    parts = (
        tokens(0, 5, finish_reason="abort"),
        tokens(1, 6, finish_reason="length"),
        tokens(7, 6, finish_reason="length"),
    )
    assert write(served(streamed(event(*parts), DONE))) == {1: [6]}


def test_an_engine_that_names_no_tokens_is_a_failure(served: Serve) -> None:
    part = tokens(0, token_ids=None, finish_reason="length")
    with pytest.raises(EngineRequestError, match="does not return token ids"):
        write(served(streamed(event(part), DONE)))


def test_a_text_that_breaks_off_is_a_failure_and_those_before_it_stay(served: Serve) -> None:
    written: dict[int, list[int]] = {}
    client = served(streamed(event(tokens(0, 5, finish_reason="length")), event(tokens(1, 6))))
    with pytest.raises(EngineRequestError, match="broke off"):
        for index, ids in client.write([[1], [2]], max_tokens=9, until="x"):
            written[index] = ids
    assert written == {0: [5]}
