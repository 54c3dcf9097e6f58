"""The keeper's side of templates: started once a node, asked for engines, held on a leash."""

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from services.contexts import fork_server
from services.contexts.engine_log import Ending, explanation
from services.contexts.protocol import LineReader
from services.contracts.clock import awake
from services.contracts.errors import EngineStartError
from services.node.runtime_dir import open_log, quoted_tail, socket_path
from services.node.supervision import SupervisedProcess, from_shell

_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 30.0
# What a leash needs beyond its grace period to end what is on it, and to say so.
_SUPERVISOR_SECONDS = 10.0
FORK_SERVER_PREFIX = "template"
"""What the names of all templates begin with."""


class EngineProcess:
    """An engine that a template forked, on the leash that our end of its connection is."""

    def __init__(self, connection: socket.socket, grace_seconds: float) -> None:
        """Raises EngineStartError when the template forks nothing, and says why."""
        self._connection = connection
        self._grace_seconds = grace_seconds
        self._lines = LineReader(connection)
        self._code: int | None = None
        self._reading = threading.Lock()
        try:
            message = self._next_message(_ANSWER_SECONDS)
        except TimeoutError:
            message = {"refused": f"it did not answer within {_ANSWER_SECONDS:g} s"}
        if message is None or "pid" not in message:
            self._connection.close()
            raise EngineStartError(
                f"the template forked no engine: {(message or {}).get('refused', 'it ended')}"
            )
        self.pid: int = message["pid"]
        self.imported_at: float = message["imported_at"]
        """When its template had the imports done, by the monotonic clock."""

    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it, or its leash."""
        return self._wait(0)

    def stop(self) -> None:
        """SIGTERM, the grace period, SIGKILL. Returns when all of it is gone."""
        if self._code is None:
            with contextlib.suppress(OSError):  # its leash may be gone
                self._connection.shutdown(socket.SHUT_WR)
            if self._wait(self._grace_seconds + _SUPERVISOR_SECONDS) is None:
                self._kill()
                self._code = -9  # whatever is left of it in the kernel, nobody waits for it
        self._connection.close()

    def _kill(self) -> None:
        # The leash itself hangs: end the session that the engine leads.
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
                    message = self._next_message(seconds)
                except TimeoutError:
                    return None
                self._code = -9 if message is None else from_shell(message["exit_code"])
            return self._code

    def _next_message(self, seconds: float) -> dict[str, Any] | None:
        """None when the other side is gone. Raises TimeoutError."""
        line = self._lines.next(seconds)
        if line is None:
            return None
        message: dict[str, Any] = json.loads(line)
        return message


def remove_fork_server_files(directory: Path) -> None:
    """The files of all templates of this runtime directory, whose keeper is gone."""
    for path in directory.glob(f"{FORK_SERVER_PREFIX}-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def has_fork_server(directory: Path) -> bool:
    """Whether a template of this runtime directory has its imports done: then its socket is there.
    One that was killed leaves it until the next is started.
    """
    return any(directory.glob(f"{FORK_SERVER_PREFIX}-*.sock"))


class ForkServer:
    """The process of services/contexts/fork_server.py for one interpreter and one environment."""

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
        self._socket.unlink(missing_ok=True)  # of one that was killed
        self._module = module
        self.log_file = directory / f"{name}.log"
        self._grace_seconds = grace_seconds
        self.log_file.unlink(missing_ok=True)
        self._was_ready = False
        # Imports leave files where temporary ones go, and so do the engines (template.py).
        self._temporary = directory / f"{name}.tmp"
        shutil.rmtree(self._temporary, ignore_errors=True)  # of one that was killed
        self._temporary.mkdir(mode=0o700)
        self._started = awake()
        with open_log(self.log_file) as output:
            self._process = SupervisedProcess(
                [python, str(Path(fork_server.__file__)), str(self._socket), module],
                environment={**environment, "TMPDIR": str(self._temporary)},
                # Engines in it get their own grace period when its end is theirs.
                grace_seconds=grace_seconds,
                output=output,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs, and its socket was not removed."""
        if self._was_ready and not self._socket.exists():
            return False
        return self._process.exit_code() is None

    def ready(self, stop: threading.Event, timeout_seconds: float) -> None:
        """Wait until engines can be forked, or `stop` is set.

        Raises EngineStartError with what it said last.
        """
        deadline = self._started + timeout_seconds
        while not self._socket.exists():
            if not self.alive:
                code = self._process.exit_code()
                why = explanation(self.log_file, Ending(code), "this node")
                raise EngineStartError(
                    f"{self._module} cannot be imported (exit code {code}). "
                    f"{why}{' ' if why else ''}{self.log_excerpt()}"
                )
            if awake() > deadline:
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
        """Raises EngineStartError when it cannot."""
        connection = socket.socket(socket.AF_UNIX)
        request = {
            "name": name,
            "argv": list(arguments),
            "environment": dict(environment),
            "log": str(log_file),
            "cores": list(cores),
            "grace_seconds": self._grace_seconds,
        }
        try:
            connection.connect(str(self._socket))
            connection.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            connection.close()
            raise EngineStartError(
                f"the template is gone: {error}. {self.log_excerpt()}"
            ) from error
        return EngineProcess(connection, self._grace_seconds)

    def log_excerpt(self) -> str:
        """The end of its log, as part of an error message."""
        return f"The last lines of its log, {self.log_file}:\n{quoted_tail(self.log_file)}"

    def stop(self) -> None:
        self._process.stop()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._socket.unlink(missing_ok=True)
        self.log_file.unlink(missing_ok=True)
