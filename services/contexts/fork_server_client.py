"""The keeper's side of a fork server: starts and supervises it, and asks it for engines."""

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from services.contexts import fork_server
from services.contexts.engine_log import ProcessExit, explanation
from services.contexts.fork_server import ForkReply, ForkRequest
from services.contracts.clock import awake_seconds
from services.contracts.errors import EngineStartError
from services.node.line_reader import LineReader
from services.node.runtime_dir import open_log, quoted_tail, socket_path
from services.node.supervision import SupervisedProcess, from_shell

_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 30.0
# What a supervisor needs beyond the grace period to kill its processes and to report it.
_SUPERVISOR_SECONDS = 10.0
_REPLY = TypeAdapter(ForkReply)
FORK_SERVER_PREFIX = "fork-server"
"""The names of a fork server's files in the runtime directory begin with this."""


class EngineProcess:
    """An engine that a fork server forked. It ends when this end of its connection is closed."""

    def __init__(self, connection: socket.socket, grace_seconds: float) -> None:
        """Raises EngineStartError, with the reason, when the fork server forks no engine."""
        self._connection = connection
        self._grace_seconds = grace_seconds
        self._lines = LineReader(connection, awake_seconds)
        self._code: int | None = None
        self._reading = threading.Lock()
        try:
            reply = self._next_reply(_ANSWER_SECONDS) or ForkReply(refused="it ended")
        except TimeoutError:
            reply = ForkReply(refused=f"it did not answer within {_ANSWER_SECONDS:g} s")
        if reply.pid is None:
            self._connection.close()
            raise EngineStartError(f"the fork server forked no engine: {reply.refused}")
        self.pid = reply.pid
        self.imported_at = reply.imported_at or 0.0
        """When its fork server had done the imports, by the monotonic clock."""

    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it or its supervisor."""
        return self._wait(0)

    def stop(self) -> None:
        """SIGTERM, the grace period, SIGKILL. Returns when all its processes have ended."""
        if self._code is None:
            with contextlib.suppress(OSError):  # its supervisor may be gone
                self._connection.shutdown(socket.SHUT_WR)
            if self._wait(self._grace_seconds + _SUPERVISOR_SECONDS) is None:
                self._kill()
                self._code = -9  # do not wait for a process that hangs in the kernel
        self._connection.close()

    def _kill(self) -> None:
        # The supervisor itself hangs: kill the session that the engine leads.
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid:
                    process.kill()
            except (ProcessLookupError, PermissionError, psutil.Error):
                continue

    def _wait(self, seconds: float) -> int | None:
        with self._reading:
            if self._code is None:
                try:
                    reply = self._next_reply(seconds)
                except TimeoutError:
                    return None
                code = None if reply is None else reply.exit_code
                self._code = -9 if code is None else from_shell(code)
            return self._code

    def _next_reply(self, seconds: float) -> ForkReply | None:
        """The next reply; None when the other side is gone. Raises TimeoutError."""
        line = self._lines.next(seconds)
        return None if line is None else _REPLY.validate_json(line)


def remove_fork_server_files(directory: Path) -> None:
    """Remove the files of this runtime directory's fork servers, after its keeper has ended."""
    for path in directory.glob(f"{FORK_SERVER_PREFIX}-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def has_fork_server(directory: Path) -> bool:
    """Whether a fork server of this runtime directory has done its imports, as its socket shows.
    The socket of a fork server that was killed stays until the next one is started.
    """
    return any(directory.glob(f"{FORK_SERVER_PREFIX}-*.sock"))


class ForkServer:
    """A process of services/contexts/fork_server.py for one interpreter and one environment."""

    def __init__(
        self,
        python: str,
        module: str,
        environment: Mapping[str, str],
        directory: Path,
        name: str,
        grace_seconds: float,
    ) -> None:
        self._socket = socket_path(directory, name)
        self._socket.unlink(missing_ok=True)  # left by one that was killed
        self._module = module
        self.log_file = directory / f"{name}.log"
        self._grace_seconds = grace_seconds
        self.log_file.unlink(missing_ok=True)
        self._was_ready = False
        # Imports and engines leave files in the temporary directory.
        self._temporary = directory / f"{name}.tmp"
        shutil.rmtree(self._temporary, ignore_errors=True)  # left by one that was killed
        self._temporary.mkdir(mode=0o700)
        self._started = awake_seconds()
        with open_log(self.log_file) as output:
            self._process = SupervisedProcess(
                [python, str(Path(fork_server.__file__)), str(self._socket), module],
                environment={**environment, "TMPDIR": str(self._temporary)},
                # When it is stopped, its engines have this grace period too.
                grace_seconds=grace_seconds,
                output=output,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs, and its socket is still there once it was ready."""
        if self._was_ready and not self._socket.exists():
            return False
        return self._process.exit_code() is None

    def ready(self, stop: threading.Event, timeout_seconds: float) -> None:
        """Wait until engines can be forked, or `stop` is set.

        Raises EngineStartError, with the end of its log, when it ends or is not ready in time.
        """
        deadline = self._started + timeout_seconds
        while not self._socket.exists():
            if not self.alive:
                code = self._process.exit_code()
                why = explanation(self.log_file, ProcessExit(code), "this node").text
                raise EngineStartError(
                    f"{self._module} cannot be imported (exit code {code}). "
                    f"{why}{' ' if why else ''}{self.log_excerpt()}"
                )
            if awake_seconds() > deadline:
                raise EngineStartError(
                    f"the imports took more than {timeout_seconds:g} s "
                    f"(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS). {self.log_excerpt()}"
                )
            if stop.wait(_POLL_SECONDS):
                return
        self._was_ready = True

    def fork(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_file: Path,
        cores: Sequence[int],
    ) -> EngineProcess:
        """Fork an engine on these `cores`. Raises EngineStartError when that fails."""
        connection = socket.socket(socket.AF_UNIX)
        request = ForkRequest(
            name=name,
            argv=list(arguments),
            environment=dict(environment),
            cores=list(cores),
            log=str(log_file),
            grace_seconds=self._grace_seconds,
        )
        try:
            connection.connect(str(self._socket))
            connection.sendall(fork_server.encode(request))
        except OSError as error:
            connection.close()
            raise EngineStartError(
                f"the fork server is gone: {error}. {self.log_excerpt()}"
            ) from error
        return EngineProcess(connection, self._grace_seconds)

    def log_excerpt(self) -> str:
        """The end of its log, for an error message."""
        return f"The last lines of its log, {self.log_file}:\n{quoted_tail(self.log_file)}"

    def stop(self) -> None:
        self._process.stop()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._socket.unlink(missing_ok=True)
        self.log_file.unlink(missing_ok=True)
