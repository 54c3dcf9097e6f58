"""The life of one engine: started on a leash, waited for with its log at hand, stopped whole."""

import os
import threading
import time
from pathlib import Path

import structlog

from services.contexts.completions import CompletionClient
from services.contexts.device import Device
from services.contexts.engine_command import engine_command, engine_environment
from services.contexts.runtime_dir import open_runtime_dir, socket_path
from services.contracts import ContextSpec, Settings
from services.contracts.errors import EngineRequestError, EngineStartError
from services.leash import Leashed

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 5.0
_SHOWN_LOG_LINES = 25
_TAIL_BYTES = 64 * 1024

log = structlog.get_logger(__name__)


class Engine:
    """vLLM's server, in a session of its own, holding one context behind a socket of ours alone.

    This object alone starts and stops it. The engine may be started again after it died. `stop` may
    be called from any thread.
    """

    def __init__(self, spec: ContextSpec, device: Device, settings: Settings) -> None:
        self._spec = spec
        self._device = device
        self._settings = settings
        directory = open_runtime_dir(settings.runtime_dir)
        name = f"{spec.context_id}-{os.getpid()}"
        self._socket = socket_path(directory, name)
        self.log_file: Path = directory / f"{name}.log"
        self._process: Leashed | None = None
        self._stopping = threading.Lock()
        self.client = CompletionClient(
            self._socket, spec.context_id, settings.engine_request_timeout_seconds
        )

    @property
    def alive(self) -> bool:
        process = self._process
        return process is not None and process.exit_code() is None

    def start(self, stop: threading.Event) -> bool:
        """Start it and wait until it answers. False when `stop` was set meanwhile.

        Raises EngineStartError, with the end of the engine's log, when it dies or stays silent.
        """
        started = time.monotonic()
        log.info("engine.starting", context=self._spec.context_id, log=str(self.log_file))
        self._spawn()
        reported = started
        while not self.client.healthy():
            now = time.monotonic()
            if stop.wait(_POLL_SECONDS):
                self.stop()
                return False
            if not self.alive:
                raise self.start_error("it ended")
            if now - started > self._settings.engine_start_timeout_seconds:
                self.stop()
                raise self.start_error(
                    f"it did not answer within {self._settings.engine_start_timeout_seconds:g} s "
                    "(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS)"
                )
            if now - reported >= _REPORT_SECONDS:
                reported = now
                log.info("engine.loading", seconds=round(now - started), says=self._last_line())
        self._socket.chmod(0o600)
        self._probe()
        log.info("engine.ready", seconds=round(time.monotonic() - started, 1))
        return True

    def stop(self) -> None:
        """Stop it, with every process that it started. It has no claims that were not answered."""
        with self._stopping:
            if self._process is not None:
                self._process.stop()
                self._process = None
            self._socket.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop it for good. Its log stays only where it tells why the engine failed."""
        well = self.alive
        self.stop()
        self.client.close()
        if well:
            self.log_file.unlink(missing_ok=True)

    def _spawn(self) -> None:
        self.stop()
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as output:
            self._process = Leashed(
                engine_command(self._spec, self._device, self._socket, self._settings),
                environment=engine_environment(self._spec, self._device),
                grace_seconds=0.2 * self._settings.grace_seconds,
                output=output,
            )

    def _probe(self) -> None:
        """Ask something small: the engine must score the very tokens that it is asked to."""
        try:
            answers = list(self.client.score([[1, 2, 3]], [1, 2]))
        except EngineRequestError as error:
            raise self.start_error(f"its first answer was no answer: {error}") from error
        if not answers:
            self.stop()
            raise self.start_error(
                "it does not score given tokens; vLLM with `logprob_token_ids` is needed (0.32 has)"
            )

    def _last_line(self) -> str:
        lines = self.last_words(1)
        return lines[0][:200] if lines else ""

    def last_words(self, lines: int = _SHOWN_LOG_LINES) -> list[str]:
        """The end of its log, without empty lines."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def start_error(self, what: str) -> EngineStartError:
        """What to raise when it cannot be used, with the end of its log."""
        code = None if self._process is None else self._process.exit_code()
        ended = "" if code is None else f" (exit code {code})"
        tail = "\n".join(f"  | {line}" for line in self.last_words())
        return EngineStartError(
            f"no engine for {self._spec.model} on {self._device.name}: {what}{ended}. "
            f"The last lines of its log, {self.log_file}:\n{tail}\n"
            "A smaller --max-model-tokens, or other KEEPWARM_ENGINE_ARGUMENTS, may help"
        )
