"""The workers of `keepwarm run`: supervised processes, replaced when they are lost."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import structlog

from keepwarm_start import python_command
from services.contracts import ContextSpec, Settings, WorkerHeartbeat
from services.contracts.addresses import is_host, join_address, split_address
from services.contracts.backoff import backoff_seconds
from services.contracts.errors import EngineError, MessageTooNew, RunIncomplete, UsageError
from services.contracts.heartbeats import RestartReason, unique_process_name
from services.contracts.settings import METRICS_OFF
from services.node.device import Device, visible_gpus
from services.node.supervision import SupervisedProcess

_SHOWN_LINES = 40
_TAIL_BYTES = 256 * 1024
_MAX_LOSSES_IN_A_ROW = 5
_LONGEST_PAUSE_SECONDS = 30.0

WORKING = "working"
"""The state of a worker whose model is loaded and that takes claims."""
_LOADING: Mapping[RestartReason | None, str] = {
    None: "loading the model",
    "engine-ended": "the engine stopped, restarting it",
    "out-of-memory": "the engine stopped because memory ran out, restarting it",
}

log = structlog.get_logger(__name__)


class WorkerProcess:
    """One worker, and those that replace it, each with an id of its own."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_file: Path,
        grace_seconds: float,
    ) -> None:
        self._command = command
        self._environment = environment
        self._log_file = log_file
        self._log_start = 0
        self._grace_seconds = grace_seconds
        self.number = number
        self.worker_id = ""
        self.losses = 0
        """How many workers were lost here."""
        self._losses_in_a_row = 0
        self._answered_by_lost = 0
        self._no_process = "not started"
        self._restart_at = 0.0
        self._process: SupervisedProcess | None = None
        self._heartbeat: WorkerHeartbeat | None = None
        self._state_since = 0.0
        self._broker_error: str | None = None

    @property
    def answered(self) -> int:
        """Claims that the engine has answered, for lost workers too. Some of them may not be in the
        store yet.
        """
        answered = 0 if self._heartbeat is None else self._heartbeat.claims_answered
        return self._answered_by_lost + answered

    @property
    def state(self) -> str:
        """What it does, in a few words."""
        if self._process is None:
            return self._no_process
        if self._broker_error is not None:
            return f"waiting: {self._broker_error}"
        if self._heartbeat is None:
            return "starting"
        if self._heartbeat.state == "starting":
            seconds = time.monotonic() - self._state_since
            return f"{_LOADING[self._heartbeat.restart_reason]}, {seconds:.0f} s"
        return WORKING if self._heartbeat.state == "serving" else "finishing"

    def start(self) -> None:
        # A lost worker's last heartbeat is still known for a while, so each has its own id.
        self.worker_id = f"{unique_process_name()}-{self.number}.{self.losses}"
        with self._open_log() as output:
            self._log_start = output.tell()
            self._process = SupervisedProcess(
                [*self._command, "--watched-as", self.worker_id],
                environment=self._environment,
                # The worker drains within its own grace period; it is killed after that.
                grace_seconds=self._grace_seconds + 10,
                output=output,
            )

    def update(self, heartbeat: WorkerHeartbeat | None, broker_error: str | None) -> None:
        """Note the latest heartbeat of the worker with this id, if there is one, and why none can
        arrive now.
        """
        self._broker_error = broker_error
        if heartbeat is None:
            return
        last, self._heartbeat = self._heartbeat, heartbeat
        if last is None or last.state != heartbeat.state:
            self._state_since = time.monotonic()
        if heartbeat.state == "serving":
            self._losses_in_a_row = 0

    def replace_if_lost(self) -> None:
        """Replace a lost worker, after a pause that grows with each loss.

        Raises EngineError, UsageError or MessageTooNew, with the worker's own message, when it
        ended with that error; RunIncomplete when too many workers in a row are lost.
        """
        if self._process is None:
            if time.monotonic() >= self._restart_at:
                self.start()
            return
        code = self._process.exit_code()
        if code is None:
            return
        # Another worker would end in the same way.
        for error in (UsageError, EngineError, MessageTooNew):
            if code == error.exit_code:
                message = self._last_lines().removeprefix("keepwarm: ")
                raise error(message or f"see {self._log_file}")
        self.losses += 1
        self._losses_in_a_row += 1
        if self._losses_in_a_row >= _MAX_LOSSES_IN_A_ROW:
            raise RunIncomplete(
                f"worker {self.number} was lost {self._losses_in_a_row} times in a row (last exit "
                f"code {code}). Fix the cause and rerun the command; the log is {self._log_file}, "
                f"and the last lines are:\n{self._last_lines()}"
            )
        pause = backoff_seconds(
            self._losses_in_a_row, first_seconds=1.0, longest_seconds=_LONGEST_PAUSE_SECONDS
        )
        log.warning(
            "worker.lost", worker=self.number, exit_code=code, again_in_seconds=round(pause, 1)
        )
        self._no_process = f"ended with exit code {code}, starting another in {pause:.0f} s"
        self._process.stop()
        self._answered_by_lost, self._heartbeat = self.answered, None
        self.worker_id, self._process = "", None
        self._restart_at = time.monotonic() + pause

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """Drain the worker, and return when it has ended."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _open_log(self) -> IO[bytes]:
        """A worker is more important than its log."""
        try:
            return self._log_file.open("ab")
        except OSError:
            return Path(os.devnull).open("ab")

    def _last_lines(self) -> str:
        """The end of the last worker's output, without its log events."""
        with contextlib.suppress(OSError), self._log_file.open("rb") as file:
            file.seek(max(self._log_start, self._log_file.stat().st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").splitlines()
            return "\n".join([line for line in lines if not line.startswith("{")][-_SHOWN_LINES:])
        return ""


def device_shares(workers: int, device: Device) -> list[dict[str, str]]:
    """For each worker, the environment variables that give it its share of the node's devices: its
    own GPU, or some of the cores. Two engines on one core would only wait for each other.

    Raises UsageError when there are fewer GPUs than workers.
    """
    if workers == 1:
        return [{}]
    if device.kind == "cuda":
        gpus = visible_gpus()
        if len(gpus) < workers:
            raise UsageError(
                f"--workers {workers}: each worker needs its own GPU, and this process may use "
                f"{len(gpus)}; name at most {len(gpus)} workers, or check CUDA_VISIBLE_DEVICES"
            )
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:workers]]
    return [
        {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        for cores in (device.cores[n::workers] or device.cores for n in range(workers))
    ]


def worker_processes(
    shares: Sequence[Mapping[str, str]],
    context: ContextSpec,
    settings: Settings,
    directory: Path,
    broker_environment: Mapping[str, str | None],
) -> list[WorkerProcess]:
    """One worker for each share of the node's devices. All serve one context."""
    command = [
        *python_command("services.cli.main", "worker"),
        *("--model", context.model, "--dtype", context.dtype),
        *("--max-model-tokens", str(context.max_model_tokens)),
        *(() if context.revision is None else ("--revision", context.revision)),
        *(() if context.adapter is None else ("--adapter", context.adapter)),
        *(
            ()
            if context.adapter_revision is None
            else ("--adapter-revision", context.adapter_revision)
        ),
        *(f"--engine-argument={argument}" for argument in context.engine_arguments),
    ]
    directory.mkdir(parents=True, exist_ok=True)
    return [
        WorkerProcess(
            number,
            command,
            _environment(
                {
                    **broker_environment,
                    **share,
                    **_metrics_environment(settings),
                    "KEEPWARM_LOG_FORMAT": "json",
                    # Only the engines of this run will start.
                    "KEEPWARM_OTHER_ENGINE_SECONDS": os.environ.get(
                        "KEEPWARM_OTHER_ENGINE_SECONDS", "30"
                    ),
                }
            ),
            directory / f"worker-{number}.log",
            settings.grace_seconds,
        )
        for number, share in enumerate(shares)
    ]


def _metrics_environment(settings: Settings) -> dict[str, str | None]:
    """The address of this process's metrics, but at a free port: two workers cannot share one."""
    address, advertised = settings.metrics_address, settings.metrics_advertise
    if advertised is not None and not is_host(advertised):
        advertised = split_address(advertised)[0]
    if address != METRICS_OFF:
        address = join_address(split_address(address)[0], 0)
    return {
        "KEEPWARM_METRICS_ADDRESS": address,
        "KEEPWARM_METRICS_ADVERTISE": advertised,
    }


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment with `changes`; None removes a variable."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}
