"""One engine process: start it, check its answers, put it to sleep, stop it."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pynvml
import structlog

from services.contexts.engine_client import Answer, EngineClient
from services.contexts.engine_command import cores_of, engine_arguments, engine_environment
from services.contexts.engine_log import Explanation, ProcessExit
from services.contexts.fork_server_client import EngineProcess, ForkServer
from services.contexts.plan import EnginePlan
from services.contracts.clock import awake_seconds
from services.contracts.errors import EngineRequestError, EngineStartError
from services.contracts.startup import StartupPhases
from services.node.device import nvml
from services.node.memory import oom_kills
from services.node.runtime_dir import log_tail, quoted_tail, socket_path

_POLL_SECONDS = 0.05
_PROGRESS_SECONDS = 1.0
_PROBE_SECONDS = 120.0
# The canary prompt: shorter than a block of the prefix cache, so that it is never served from it.
_CANARY_PROMPT, _CANARY_TOKENS = (1, 2, 3), (1, 2)
# The largest difference between two answers to it, in log probability. Other prompts in the same
# step change bfloat16's rounding a little; wrong weights change the answer by several.
_CANARY_TOLERANCE = 1.0
_CANARY_TIMES = 3
# What vLLM 0.32 logs of its own phases; the GPU's runner and the CPU's differ in the first.
_LOAD = re.compile(r"(?:Model loading took .* and|Loading weights took) ([\d.]+) sec")
_COMPILE = re.compile(r"init engine \(.*\) took ([\d.]+) s")

log = structlog.get_logger(__name__)


class Engine:
    """vLLM's server in its own session. It holds one context and listens on a private socket."""

    def __init__(self, plan: EnginePlan, directory: Path) -> None:
        """`directory` is the runtime directory. Raises UsageError when its path is too long."""
        self.plan = plan
        self.socket = socket_path(directory, plan.name)
        self.log_file = directory / f"{plan.name}.log"
        self._process: EngineProcess | None = None
        self._oom_kills: int | None = None
        self._canary: Answer | None = None
        """Its answer to the canary prompt at its start."""
        self.failed_start: ProcessExit | None = None
        """How it had ended when its start failed."""
        self._stopping = threading.Lock()

    @property
    def alive(self) -> bool:
        return self._process is not None and self.exit_code() is None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def start(
        self,
        fork_server: ForkServer,
        cache: Path,
        stop: threading.Event,
        timeout_seconds: float,
        loading: Callable[[str], None],
        started_at: float,
    ) -> StartupPhases | None:
        """Fork it and wait until it answers. None when `stop` was set meanwhile. `loading` is
        called with the last line of its log every second. The start's phases count from
        `started_at` (monotonic clock), because weights were fetched and modules imported since.

        Raises EngineStartError when it ends, or does not answer in time.
        """
        started = reported = awake_seconds()
        fork_server.ready(stop, timeout_seconds)
        self.log_file.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)  # left by an engine that was killed
        if stop.is_set():
            return None
        self._oom_kills = oom_kills()
        self._process = fork_server.fork(
            self.plan.name,
            engine_arguments(self.plan, self.socket),
            engine_environment(self.plan, cache),
            self.log_file,
            cores_of(self.plan),
        )
        client = self._client()
        while not client.healthy():
            now = awake_seconds()
            if stop.wait(_POLL_SECONDS):
                self.stop()
                return None
            if not self.alive:
                raise self._start_failed("it ended")
            if now - started > timeout_seconds:
                raise self._start_failed(
                    f"it did not answer within {timeout_seconds:g} s "
                    "(KEEPWARM_ENGINE_START_TIMEOUT_SECONDS)"
                )
            if now - reported >= _PROGRESS_SECONDS:
                reported = now
                loading("".join(log_tail(self.log_file, 1))[:200])
        self.socket.chmod(0o600)
        answered = time.monotonic()
        self._probe(client)
        ready = time.monotonic()
        imports = max(0.0, self._process.imported_at - started_at)
        return self._phases(imports, ready - answered, ready - started_at)

    def stop(self) -> None:
        """Stop it and every process that it started. May be called from any thread."""
        with self._stopping:
            if self._process is not None:
                self._process.stop()
            self.socket.unlink(missing_ok=True)

    def healthy(self) -> bool:
        """Whether it reports within seconds that it is healthy."""
        return self._client().healthy()

    def answers_as_at_start(self) -> bool:
        """Whether it answers the canary prompt as it did at its start, in one of three attempts:
        rounding depends on what else is in the same step. Waits for the engine's answers.
        """
        answers: list[Answer | None] = []
        try:
            for _ in range(_CANARY_TIMES):
                answers.append(self._answer_to_canary(self._client()))
                if _alike(answers[-1], self._canary):
                    return True
        except EngineRequestError as error:
            log.error("engine.no_answer", engine=self.plan.name, reason=str(error))
        log.error("engine.wrong", engine=self.plan.name, at_start=self._canary, now=answers)
        return False

    def sleep(self) -> None:
        """Free the GPU, and keep the weights in host memory. Raises EngineRequestError."""
        self._client().sleep()

    def wake(self) -> None:
        """Move the weights back to the GPU. Raises EngineRequestError."""
        self._client().wake()

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load an adapter for requests with this model name. Raises EngineRequestError."""
        self._client().load_adapter(name, directory)

    def _client(self) -> EngineClient:
        return EngineClient(self.socket, self.plan.spec.base.context_id, _PROBE_SECONDS)

    def memory_bytes(self) -> int | None:
        """How much it holds now of its GPU or of the node; None when that cannot be measured."""
        try:
            process = psutil.Process(self.pid)
            pids = [process.pid, *(child.pid for child in process.children(recursive=True))]
            if self.plan.device.kind == "cuda":
                return _gpu_bytes(set(pids)) or None  # NVML may not know them
            return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)
        except (psutil.Error, pynvml.NVMLError):
            return None

    def exit_code(self) -> int | None:
        process = self._process
        return None if process is None else process.exit_code()

    def process_exit(self) -> ProcessExit:
        """How it ended; the exit code is None while it runs."""
        return ProcessExit(self.exit_code(), oom_kills() != self._oom_kills)

    def _probe(self, client: EngineClient) -> None:
        """Send the canary prompt: the engine must score exactly the tokens that it is asked for."""
        try:
            self._canary = self._answer_to_canary(client)
        except EngineRequestError as error:
            raise self._start_failed(f"its first request failed: {error}") from error
        if self._canary is None:
            raise self._start_failed(
                "it does not score given tokens; install a vLLM with `logprob_token_ids` (0.32)"
            )

    def _answer_to_canary(self, client: EngineClient) -> Answer | None:
        """None when the engine returned no usable answer. Raises EngineRequestError."""
        answers = [answer for _, answer in client.score([_CANARY_PROMPT], _CANARY_TOKENS)]
        return answers[0] if answers else None

    def _start_failed(self, what: str) -> EngineStartError:
        self.failed_start = self.process_exit()
        self.stop()
        code = self.failed_start.exit_code
        return EngineStartError(what if code is None else f"{what} (exit code {code})")

    def _phases(self, imports: float, first_token: float, total: float) -> StartupPhases:
        try:
            log_text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            log_text = ""
        return StartupPhases(
            imports=round(imports, 3),
            load=_seconds(_LOAD, log_text),
            compile=_seconds(_COMPILE, log_text),
            first_token=round(first_token, 3),
            total=round(total, 3),
        )


def _alike(answer: Answer | None, earlier: Answer | None) -> bool:
    """Whether both give the canary's tokens about the same probabilities."""
    return (
        answer is not None
        and earlier is not None
        and all(
            abs(now - then) <= _CANARY_TOLERANCE
            for now, then in zip(answer.logprobs, earlier.logprobs, strict=True)
        )
    )


def start_error(plan: EnginePlan, log_file: Path, what: str, why: Explanation) -> EngineStartError:
    """The error for a user when an engine cannot be used: the cause and the next step, if they are
    known, and the end of its log.
    """
    sentences = [f"no engine for {plan.spec.model} on {plan.device.name}: {what.rstrip('.')}."]
    sentences += filter(None, [why.text])
    tail = quoted_tail(log_file)
    if tail:
        sentences.append(f"The last lines of its log, {log_file}:\n{tail}")
    return EngineStartError(" ".join(sentences))


def _seconds(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.findall(text)
    return float(found[-1]) if found else None


def _gpu_bytes(pids: set[int]) -> int:
    with nvml():
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return sum(
            process.usedGpuMemory or 0
            for handle in handles
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid in pids
        )
