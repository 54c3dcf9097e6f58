"""The fork server: a process that has done an engine's imports, and forks engines.

Importing vLLM takes longer than loading a small model, and without a fork server every process of
vLLM does it again. `PYTHON fork_server.py SOCKET MODULE` imports MODULE once, listens, and forks an
engine for every connection. The keeper sends one `ForkRequest`, as a line of JSON. The fork server
replies with a `ForkReply` that has the engine's pid, or says why it forks none, and at the end with
one that has its exit code. When the keeper closes its side, or dies, the engine ends.

The engine's own interpreter runs this file, and need not have Keepwarm's libraries: it imports the
standard library, psutil (which vLLM needs too) and two modules of node/. So its messages are
dataclasses, where the keeper's others are pydantic's models. In all other respects a forked engine
is `python -m MODULE`. Neither CUDA nor threads survive a fork: nothing here initialises CUDA, and a
fork server that has more than one thread refuses to fork.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import keepwarm_start

if __name__ == "__main__":
    keepwarm_start.isolate()  # also from this script's own directory

from services.contexts import cpu_lora
from services.node.line_reader import LineReader
from services.node.supervision import adopt_orphans, die_with_parent, supervise

_REQUEST_SECONDS = 10.0
# A unix socket's path may have 107 bytes, and vLLM's sockets have names of 36.
_LONGEST_TEMPORARY_BYTES = 107 - len("/kw-12345678/") - 36
# vLLM's processes import these only when they begin to work. Missing ones do not matter.
_LATER_IMPORTS = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
)


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """Fork this engine, and end it when the connection is closed."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    cores: list[int]
    log: str
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class ForkReply:
    """What became of the engine; only what is known is not None."""

    pid: int | None = None
    imported_at: float | None = None
    """When the fork server had done the imports, by the monotonic clock."""
    refused: str | None = None
    """Why no engine was forked."""
    exit_code: int | None = None


def encode(message: ForkRequest | ForkReply) -> bytes:
    """The message as a line of JSON."""
    return json.dumps(asdict(message)).encode() + b"\n"


class ForkedProcess:
    """A forked child with the interface of `subprocess.Popen` (`supervision.ChildProcess`)."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                die_with_parent()
                work()
                code = 0
            except SystemExit as ending:
                code = ending.code if isinstance(ending.code, int) else int(bool(ending.code))
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired, as `Popen.wait` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _become_engine(
    module: str, request: ForkRequest, connection: socket.socket, temporary: str
) -> None:
    """Run MODULE in the engine's process as `python -m MODULE` would."""
    connection.close()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    os.sched_setaffinity(0, request.cores)
    os.environ.update(request.environment)
    os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = temporary
    tempfile.tempdir = None  # an import may have set it
    _apply_offline_mode()
    sys.argv = [module, *request.argv]
    _set_process_title(f"keepwarm engine {request.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # MODULE was imported before, on purpose
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _apply_offline_mode() -> None:
    # The hub's library read this when it was imported, before the model was known.
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None and os.environ.get("HF_HUB_OFFLINE") == "1":
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _set_process_title(title: str) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)


def _guard_engine(
    module: str, request: ForkRequest, connection: socket.socket, imported_at: float
) -> None:
    """Supervise the engine in its guard process, and report how it ended."""
    os.setsid()
    guard = os.getpid()
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # vLLM leaves sockets and directories behind in the temporary directory.
    base = tempfile.gettempdir()
    short = base if len(os.fsencode(base)) <= _LONGEST_TEMPORARY_BYTES else "/tmp"  # noqa: S108
    temporary = tempfile.mkdtemp(prefix="kw-", dir=short)

    def start() -> ForkedProcess:
        engine = ForkedProcess(lambda: _become_engine(module, request, connection, temporary))
        _send(connection, ForkReply(pid=engine.pid, imported_at=imported_at))
        return engine

    code = supervise(start, connection.fileno(), request.grace_seconds)
    if os.getpid() == guard:
        shutil.rmtree(temporary, ignore_errors=True)
        _send(connection, ForkReply(exit_code=code))
    os._exit(code)


def _prefer_fork() -> None:
    """On processors vLLM spawns its processes, and one more to inspect the model. As long as
    nothing has been computed, a fork does the same without the imports.
    """
    try:
        registry: Any = importlib.import_module("vllm.model_executor.models.registry")
        current: Any = importlib.import_module("vllm.platforms").current_platform
        if not current.is_cpu():
            return
        platform = type(current)
        check = platform.check_and_update_config
    except (ImportError, AttributeError):
        return  # another version of vLLM: leave its ways of starting processes

    def check_and_fork(config: Any) -> None:
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = staticmethod(check_and_fork)
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda function: function()


def _why_not_forkable() -> str | None:
    """The reason why this process must not be forked; None if it may."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised"
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  (a kernel directory)
    return None if threads == 1 else f"it has {threads} threads"


def _send(connection: socket.socket, reply: ForkReply) -> None:
    with contextlib.suppress(OSError):  # the keeper may be gone
        connection.sendall(encode(reply))


def _read_request(connection: socket.socket) -> ForkRequest | None:
    line = LineReader(connection).next(_REQUEST_SECONDS)
    connection.settimeout(None)
    return None if line is None else ForkRequest(**json.loads(line))


def _serve(listener: socket.socket, module: str, imported_at: float) -> None:
    # Guards report through their connections. The kernel reaps them, and orphans of a killed guard.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    adopt_orphans()
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                request = _read_request(connection)
            except (OSError, ValueError, TypeError):
                continue
            if request is None:
                continue
            why_not = _why_not_forkable()
            if why_not is not None:
                _send(connection, ForkReply(refused=why_not))
                continue
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    _guard_engine(module, request, connection, imported_at)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)


def main() -> None:
    path, module = sys.argv[1:]
    started = time.monotonic()
    importlib.import_module(module)
    for later in _LATER_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(later)
    _prefer_fork()
    cpu_lora.install()
    gc.collect()
    gc.freeze()  # otherwise a collection in a child would touch all pages, and so copy them
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108
    # It gets its name once it listens, so that every client that finds it can connect.
    listener.bind(f"{path}.new")
    os.chmod(f"{path}.new", 0o600)  # noqa: PTH101
    listener.listen(16)
    imported_at = time.monotonic()  # the same clock in all processes of a node
    sys.stdout.write(f"imported {module} in {imported_at - started:.2f} s\n")
    sys.stdout.flush()
    os.rename(f"{path}.new", path)  # noqa: PTH104
    _serve(listener, module, imported_at)


if __name__ == "__main__":
    main()
