"""The life of an engine, shown on the test engine that answers at once (tests/doubles)."""

import gc
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from services.contexts.engine import Engine, start_error
from services.contexts.engine_client import EngineClient
from services.contexts.engine_command import ENGINE_MODULE, fork_server_environment
from services.contexts.engine_log import ProcessExit, explanation
from services.contexts.fork_server_client import ForkServer
from services.contexts.plan import EnginePlan
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineStartError
from services.contracts.startup import StartupPhases
from services.node.device import Device
from services.node.runtime_dir import log_tail
from tests.interpreters import interpreter

# httpcore leaves a socket that could not connect to Python's garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

NEVER = threading.Event()
GENEROUS_SECONDS = 60.0


class Forge:
    """Makes engines from one fork server, and takes them down."""

    def __init__(self, directory: Path, context: ContextSpec) -> None:
        self._directory = directory
        self._context = context
        self._made: list[Engine] = []
        self.fork_server: ForkServer | None = None

    def engine(self) -> Engine:
        self._made.append(Engine(self.plan(), self._directory))
        return self._made[-1]

    def plan(self) -> EnginePlan:
        cores = tuple(os.sched_getaffinity(0))
        return EnginePlan.of(self._context, Device("cpu", "Xeon", 2**34, cores), load_settings())

    def start(
        self,
        engine: Engine,
        *,
        stop: threading.Event = NEVER,
        seconds: float = GENEROUS_SECONDS,
        loading: Callable[[str], None] = lambda _: None,
        started_at: float | None = None,
    ) -> StartupPhases | None:
        started_at = time.monotonic() if started_at is None else started_at
        cache = self._directory / "cache"
        fork_server = self.fork_server_of(engine)
        return engine.start(fork_server, cache, stop, seconds, loading, started_at)

    def fork_server_of(self, engine: Engine) -> ForkServer:
        if self.fork_server is None:
            self.fork_server = ForkServer(
                engine.plan.python,
                ENGINE_MODULE,
                fork_server_environment(engine.plan),
                self._directory,
                "fork-server",
                grace_seconds=5,
            )
        return self.fork_server

    def close(self) -> None:
        for engine in self._made:
            engine.stop()
        if self.fork_server is not None:
            self.fork_server.stop()


@pytest.fixture
def forge(
    context: ContextSpec, tmp_path: Path, doubles_python: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Forge]:
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", str(doubles_python))
    forge = Forge(tmp_path, context)
    yield forge
    forge.close()
    gc.collect()  # here, and not in the midst of another file's tests


def server_of(directory: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program in vLLM's place."""
    package = directory / "programs" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for level in (package, *package.parents[:2]):
        (level / "__init__.py").touch()
    (package / "api_server.py").write_text(source)
    python = interpreter(directory / "python", directory / "programs")
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", str(python))


def test_an_engine_that_started_answers_behind_a_socket_of_its_owners(
    forge: Forge, context: ContextSpec
) -> None:
    running = forge.engine()
    assert not running.alive
    phases = forge.start(running)
    assert running.alive
    assert phases is not None and phases.total > 0 and phases.first_token is not None
    assert stat.S_IMODE(running.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(running.log_file.stat().st_mode) == 0o600
    client = EngineClient(running.socket, context.context_id, GENEROUS_SECONDS)
    answers = client.score([[1, 2], [3]], [7, 8])
    assert sorted(index for index, _ in answers) == [0, 1]


@pytest.mark.parametrize("ended", ["stopped", "killed"])
def test_nothing_is_left_where_temporary_files_go(
    ended: str, forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "fork-server.tmp"
    monkeypatch.setenv("VLLM_TEST_LITTER", "1")
    running = forge.engine()
    forge.start(running)
    (of_the_engine,) = temporary.iterdir()
    assert len(list(of_the_engine.iterdir())) == 2
    if ended == "stopped":
        running.stop()
    else:
        assert running.pid is not None
        os.kill(running.pid, signal.SIGKILL)
        deadline = time.monotonic() + GENEROUS_SECONDS
        while running.alive:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert list(temporary.iterdir()) == []
    forge.close()
    assert not temporary.exists()


def test_the_imports_are_paid_once_for_all_engines_of_a_fork_server(forge: Forge) -> None:
    first = forge.start(forge.engine())
    second = forge.start(forge.engine())
    assert first is not None and second is not None
    assert first.imports and second.imports == 0


def test_the_imports_take_what_they_took_whenever_somebody_looks(forge: Forge) -> None:
    engine = forge.engine()
    fork_server = forge.fork_server_of(engine)
    started_at = time.monotonic()
    fork_server.ready(NEVER, GENEROUS_SECONDS)
    took = time.monotonic() - started_at
    time.sleep(1)  # weights are fetched, say
    fetched = forge.start(engine, started_at=started_at)
    assert fetched is not None and fetched.imports and fetched.total
    assert fetched.imports <= took + 0.001 and fetched.total >= took + 1


def test_a_start_has_no_part_in_imports_that_were_done_before_it(forge: Forge) -> None:
    engine = forge.engine()
    fork_server = forge.fork_server_of(engine)  # for a start that was given up
    fork_server.ready(NEVER, GENEROUS_SECONDS)
    later = forge.start(engine)
    assert later is not None and later.imports == 0


def test_an_engine_that_was_stopped_leaves_no_process_and_no_socket(
    forge: Forge, tmp_path: Path
) -> None:
    running = forge.engine()
    forge.start(running)
    assert running.pid is not None
    process = psutil.Process(running.pid)
    holder, guard, fork_server = process.parents()[:3]
    running.stop()
    assert not running.alive and running.exit_code() is not None
    assert not process.is_running()
    psutil.wait_procs([holder, guard], timeout=GENEROUS_SECONDS)
    assert not holder.is_running() and not guard.is_running()
    assert fork_server.is_running()  # for the next engine
    assert not running.socket.exists()


@pytest.mark.parametrize("victim", ["engine", "holder", "guard"])
def test_whichever_process_of_an_engine_is_killed_the_others_go_as_well(
    forge: Forge, victim: str
) -> None:
    running = forge.engine()
    forge.start(running)
    assert running.pid is not None
    engine = psutil.Process(running.pid)
    holder, guard = engine.parents()[:2]
    {"engine": engine, "holder": holder, "guard": guard}[victim].send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([engine, holder, guard], timeout=GENEROUS_SECONDS)
    assert len(gone) == 3 and not alive
    assert not running.alive
    assert running.exit_code() == -9 if victim != "holder" else running.exit_code() is not None


def test_engines_end_when_their_keeper_closes_their_connections_by_dying(forge: Forge) -> None:
    running = forge.engine()
    forge.start(running)
    assert running.pid is not None and forge.fork_server is not None
    engine = psutil.Process(running.pid)
    # What the kernel does when the keeper dies.
    running._process._connection.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
    engine.wait(GENEROUS_SECONDS)


def test_stopping_what_never_started_is_quiet(forge: Forge) -> None:
    forge.engine().stop()


def test_an_engine_that_dies_is_reported_with_its_exit_code_and_the_end_of_its_log(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TEST_FAULT", "no-start")
    failing = forge.engine()
    with pytest.raises(EngineStartError) as failed:
        forge.start(failing)
    why = explanation(failing.log_file, ProcessExit(), failing.plan.device.name)
    message = str(start_error(failing.plan, failing.log_file, str(failed.value), why))
    assert "no engine for models/small on Xeon: it ended (exit code 3)" in message
    assert f"its log, {failing.log_file}:" in message
    assert "  | RuntimeError: out of memory, says the test engine" in message


def test_a_fork_server_that_cannot_import_the_engine_is_reported_with_its_log(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_of(tmp_path, "raise ImportError('libcudart.so.13 is missing')", monkeypatch)
    with pytest.raises(EngineStartError) as failed:
        forge.start(forge.engine())
    assert "cannot be imported" in str(failed.value)
    assert "  | ImportError: libcudart.so.13 is missing" in str(failed.value)


def test_a_fork_server_that_has_several_threads_forks_nothing_and_replies_why(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    server_of(tmp_path, source, monkeypatch)
    with pytest.raises(
        EngineStartError, match="the fork server forked no engine: it has 2 threads"
    ):
        forge.start(forge.engine())


def test_only_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    assert log_tail(log) == []
    lines = "".join(f"{number}\n" for number in range(1, 20_001))
    log.write_bytes(lines.encode() + b"\ncaf\351\nthe last word\n")
    shown = log_tail(log)
    assert len(shown) == 25
    assert shown[-3:] == ["20000", "caf\ufffd", "the last word"]
    assert log_tail(log, 1) == ["the last word"]


def test_an_engine_that_stays_silent_is_stopped(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_of(tmp_path, LOADING, monkeypatch)
    silent = forge.engine()
    heard: list[str] = []

    def clock() -> float:
        return time.monotonic() + GENEROUS_SECONDS * heard.count("loading weights")

    monkeypatch.setattr("services.contexts.engine.awake_seconds", clock)
    with pytest.raises(EngineStartError) as failed:
        forge.start(silent, loading=heard.append)
    assert "did not answer within 60 s (KEEPWARM_ENGINE_START_TIMEOUT_SECONDS)" in str(failed.value)
    assert heard[-1] == "loading weights"
    assert not silent.alive


@pytest.mark.parametrize(
    ("content_type", "reason"),
    [
        # A server of the right protocol that knows nothing of `logprob_token_ids`.
        ("text/event-stream", "it does not score given tokens; install a vLLM with"),
        # It says that it is well and speaks another protocol.
        ("application/json", "its first request failed: the engine broke"),
    ],
)
def test_an_engine_that_does_not_score_the_tokens_that_it_is_asked_to_is_not_used(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content_type: str, reason: str
) -> None:
    server_of(tmp_path, UNSCORED.replace("text/event-stream", content_type), monkeypatch)
    unscored = forge.engine()
    with pytest.raises(EngineStartError, match=reason):
        forge.start(unscored)
    assert not unscored.alive


def test_a_stop_ends_the_wait_and_the_engine(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_of(tmp_path, LOADING, monkeypatch)
    waiting = forge.engine()
    stop = threading.Event()
    assert forge.start(waiting, stop=stop, loading=lambda _: stop.set()) is None
    assert not waiting.alive


def test_the_leftover_socket_of_an_earlier_engine_is_no_obstacle(forge: Forge) -> None:
    engine = forge.engine()
    engine.socket.touch()
    assert forge.start(engine) is not None


@pytest.mark.parametrize(("known", "held"), [(True, 7), (False, None)])
def test_memory_that_nvml_reports_for_other_processes_is_not_the_engines(
    context: ContextSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
    held: int | None,
) -> None:
    """It counts processes as the host does, and in a container they have other numbers."""
    processes = [SimpleNamespace(pid=os.getpid() if known else -1, usedGpuMemory=7)]
    for name, answer in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetComputeRunningProcesses": processes,
    }.items():
        monkeypatch.setattr(f"services.contexts.engine.pynvml.{name}", lambda *_, a=answer: a)
    gpu = Device("cuda", "H100", 2**36, (0,), gpu="0")
    engine = Engine(EnginePlan.of(context, gpu, load_settings()), tmp_path)
    monkeypatch.setattr(Engine, "pid", os.getpid())
    assert engine.memory_bytes() == held


LOADING = """
import time
if __name__ == "__main__":
    print("loading weights", flush=True)
    time.sleep(600)
"""
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

if __name__ == "__main__":
    path = sys.argv[sys.argv.index("--uds") + 1]
    socketserver.UnixStreamServer(path, Handler).serve_forever()
"""
