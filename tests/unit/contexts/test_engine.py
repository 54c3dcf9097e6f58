"""The life of an engine, shown on the test engine that answers at once (tests/doubles)."""

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.contexts import Device
from services.contexts.engine import Engine
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineStartError

# httpcore leaves a socket that could not connect to Python's garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

NEVER = threading.Event()


@pytest.fixture
def engine(
    context: ContextSpec, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    monkeypatch.setenv("PYTHONPATH", str(repository / "tests" / "doubles"))
    made: list[Engine] = []

    def make(fault: str = "", **settings: object) -> Engine:
        monkeypatch.setenv("TEST_ENGINE_FAULT", fault)
        chosen = load_settings(runtime_dir=tmp_path / "run", **settings)
        made.append(Engine(context, Device("cpu", "Xeon", 2**34, (0,)), chosen))
        return made[-1]

    yield make
    for each in made:
        each.close()


def script(directory: Path, *lines: str) -> Path:
    """A program in the place of Python."""
    path = directory / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def sockets(directory: Path) -> list[Path]:
    return list((directory / "run").glob("*.sock"))


def test_an_engine_that_started_answers_behind_a_socket_of_its_owners(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    running = engine()
    assert not running.alive
    assert running.start(NEVER)
    assert running.alive
    (path,) = sockets(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(running.log_file.stat().st_mode) == 0o600
    answers = running.client.score([[1, 2], [3]], [7, 8])
    assert sorted(index for index, _ in answers) == [0, 1]


def test_an_engine_that_ended_well_leaves_no_process_no_socket_and_no_log(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    running = engine()
    before = set(psutil.Process().children(recursive=True))
    running.start(NEVER)
    started = set(psutil.Process().children(recursive=True)) - before
    assert started
    running.close()
    assert not any(process.is_running() for process in started)
    assert not running.alive
    assert list((tmp_path / "run").iterdir()) == []


def test_an_engine_can_be_started_again(engine: Callable[..., Engine]) -> None:
    running = engine()
    assert running.start(NEVER)
    assert running.start(NEVER)
    assert running.client.healthy()


def test_stopping_what_never_started_is_quiet(engine: Callable[..., Engine]) -> None:
    engine().stop()


def test_an_engine_that_dies_is_told_with_its_exit_code_and_the_end_of_its_log(
    engine: Callable[..., Engine],
) -> None:
    failing = engine("no-start")
    with pytest.raises(EngineStartError) as failed:
        failing.start(NEVER)
    message = str(failed.value)
    assert "no engine for models/small on Xeon: it ended (exit code 3)" in message
    assert f"its log, {failing.log_file}:" in message
    assert "  | RuntimeError: out of memory, says the test engine" in message
    failing.close()
    assert failing.log_file.exists()


def test_only_the_end_of_a_long_log_is_shown(engine: Callable[..., Engine], tmp_path: Path) -> None:
    program = script(
        tmp_path, "seq 1 20000", "echo", "printf 'caf\\351\\n'", "echo the last word", "exit 1"
    )
    with pytest.raises(EngineStartError) as failed:
        engine(engine_python=program).start(NEVER)
    shown = [line for line in str(failed.value).splitlines() if line.startswith("  | ")]
    assert len(shown) == 25
    assert shown[-3:] == ["  | 20000", "  | caf\ufffd", "  | the last word"]


def test_an_engine_that_stays_silent_is_stopped(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    program = script(tmp_path, "echo loading weights", "exec sleep 600")
    silent = engine(engine_python=program, engine_start_timeout_seconds=0.3)
    with pytest.raises(EngineStartError) as failed:
        silent.start(NEVER)
    assert "did not answer within 0.3 s (KEEPWARM_ENGINE_START_TIMEOUT_SECONDS)" in str(
        failed.value
    )
    assert "  | loading weights" in str(failed.value)
    assert not silent.alive


def test_an_engine_that_does_not_score_the_tokens_that_it_is_asked_to_is_not_used(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    # A server of the right protocol that knows nothing of `logprob_token_ids`.
    program = script(tmp_path, f'exec {os.sys.executable} {tmp_path / "server.py"} "$@"')
    (tmp_path / "server.py").write_text(UNSCORED)
    unscored = engine(engine_python=program)
    with pytest.raises(EngineStartError, match="it does not score given tokens; vLLM with"):
        unscored.start(NEVER)
    assert not unscored.alive


def test_an_engine_whose_first_answer_is_no_answer_is_not_used(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    # It says that it is well and speaks another protocol.
    program = script(tmp_path, f'exec {os.sys.executable} {tmp_path / "server.py"} "$@"')
    (tmp_path / "server.py").write_text(UNSCORED.replace("text/event-stream", "application/json"))
    with pytest.raises(EngineStartError, match="its first answer was no answer: the engine broke"):
        engine(engine_python=program).start(NEVER)


def test_the_last_words_of_an_engine_are_the_end_of_its_log(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    failing = engine(engine_python=script(tmp_path, "seq 1 50", "echo", "exit 1"))
    assert failing.last_words() == []
    with pytest.raises(EngineStartError):
        failing.start(NEVER)
    assert failing.last_words() == [str(number) for number in range(26, 51)]
    assert failing.last_words(2) == ["49", "50"]


def test_being_told_to_stop_ends_the_wait_and_the_engine(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    waiting = engine(engine_python=script(tmp_path, "exec sleep 600"))
    stop = threading.Event()
    stop.set()
    assert not waiting.start(stop)
    assert not waiting.alive


def test_the_leftover_socket_of_an_earlier_engine_is_no_obstacle(
    engine: Callable[..., Engine], context: ContextSpec, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    left_over = tmp_path / "run" / f"{context.context_id}-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(left_over))
        assert engine().start(NEVER)


UNSCORED = """
import json, socketserver, sys
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *_):
        pass

socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""
