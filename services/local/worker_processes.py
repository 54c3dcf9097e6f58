"""The workers of `keepwarm run`: supervised processes, replaced when they are lost."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from keepwarm_start import python_command
from services.contexts.engine_log import OOM
from services.contracts import ContextSpec, Settings
from services.contracts.addresses import any_port, is_host, split_address
from services.contracts.backoff import backoff_seconds
from services.contracts.errors import EngineError, MessageTooNew, RunIncomplete, UsageError
from services.contracts.settings import METRICS_OFF
from services.gpu_worker.answer_count import PROGRESS_EVENT
from services.node.device import Device, visible_gpus
from services.node.supervision import SupervisedProcess

_SHOWN_LINES = 40
_READ_OUTPUT_SECONDS = 5.0
_MAX_LOSSES_IN_A_ROW = 5
_LONGEST_PAUSE_SECONDS = 30.0

WORKING = "working"
"""The state of a worker whose model is loaded and that takes claims."""
_STATES = {
    "worker.starting": "starting",
    "engine.starting": "starting the engine",
    "engine.ready": WORKING,
    "worker.taking": WORKING,
    "engine.died": "the engine stopped, restarting it",
    "engine.start_failed": "the engine did not start, retrying",
    "worker.draining": "finishing",
    "worker.stopped": "stopped",
    "broker.waiting": "waiting for RabbitMQ",
    "broker.blocked": "waiting: RabbitMQ is short of memory or disk",
}
_BROKER_IS_BACK = ("broker.connected", "broker.unblocked")
_NO_ENGINE = ("worker.starting", "engine.starting", "engine.died", "engine.start_failed")

log = structlog.get_logger(__name__)


class WorkerProcess:
    """One worker, and those that replace it. `state` describes in a few words what it does."""

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
        self._grace_seconds = grace_seconds
        self.number = number
        self.state = "not started"
        self.losses = 0
        """How many workers were lost here."""
        self._loaded = self._worked = False
        self._losses_in_a_row = 0
        self._answered = self._answered_by_lost = 0
        self._restart_at = 0.0
        self._last_lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        self._process: SupervisedProcess | None = None
        self._reader: threading.Thread | None = None

    @property
    def answered(self) -> int:
        """Claims that the engine has answered, for lost workers too. Some of them may not be in the
        store yet.
        """
        return self._answered_by_lost + self._answered

    def start(self) -> None:
        self.state = "starting"
        self._last_lines.clear()
        self._process = SupervisedProcess(
            self._command,
            environment=self._environment,
            # The worker drains within its own grace period; it is killed after that.
            grace_seconds=self._grace_seconds + 10,
            output=subprocess.PIPE,
        )
        self._reader = threading.Thread(
            target=self._read, args=(self._process,), name=f"worker-{self.number}", daemon=True
        )
        self._reader.start()

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
            if self._worked:
                self._losses_in_a_row = 0
            return
        if self._reader is not None:
            self._reader.join(_READ_OUTPUT_SECONDS)
        output = "\n".join(self._last_lines)
        # Another worker would end in the same way.
        for error in (UsageError, EngineError, MessageTooNew):
            if code == error.exit_code:
                raise error(output.removeprefix("keepwarm: ") or f"see {self._log_file}")
        self.losses += 1
        self._losses_in_a_row += 1
        self._answered_by_lost, self._answered = self.answered, 0
        if self._losses_in_a_row >= _MAX_LOSSES_IN_A_ROW:
            raise RunIncomplete(
                f"worker {self.number} was lost {self._losses_in_a_row} times in a row (last exit "
                f"code {code}). Fix the cause and rerun the command; the log is {self._log_file}, "
                f"and the last lines are:\n{output}"
            )
        pause = backoff_seconds(
            self._losses_in_a_row, first_seconds=1.0, longest_seconds=_LONGEST_PAUSE_SECONDS
        )
        log.warning(
            "worker.lost", worker=self.number, exit_code=code, again_in_seconds=round(pause, 1)
        )
        self.state = f"ended with exit code {code}, starting another in {pause:.0f} s"
        self._process.stop()
        self._process, self._loaded, self._worked = None, False, False
        self._restart_at = time.monotonic() + pause

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """Drain the worker, and return when it has ended."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _read(self, process: SupervisedProcess) -> None:
        """Read all output: a pipe that is not read fills up and blocks the worker."""
        assert process.output is not None
        with contextlib.suppress(OSError):
            self._log_file.touch()
        with process.output as lines:
            for line in lines:
                try:
                    self._read_line(line)
                except Exception:
                    log.exception("worker.output_unreadable", worker=self.number)

    def _read_line(self, line: bytes) -> None:
        event = _event(line)
        if event.get("event") == PROGRESS_EVENT:
            self._answered = int(event["answered"])
            return
        if event:
            self._update_state(event)
        else:
            self._last_lines.append(line.decode(errors="replace").rstrip())
        # Opened each time: a full disk may have space again, a removed directory may be back.
        with contextlib.suppress(OSError), self._log_file.open("ab") as file:
            file.write(line)

    def _update_state(self, event: Mapping[str, Any]) -> None:
        name = str(event["event"])
        if name == "engine.loading":
            self.state = f"loading the model, {event.get('seconds')} s"
        elif name in _BROKER_IS_BACK:
            self.state = WORKING if self._loaded else "starting the engine"
        elif name in _STATES:
            self.state = _STATES[name]
            if OOM in str(event.get("reason")):
                self.state += ": memory ran out"
            self._loaded = self.state == WORKING or (self._loaded and name not in _NO_ENGINE)
            self._worked = self._worked or name == "worker.taking"


def _event(line: bytes) -> Mapping[str, Any]:
    """The event in a line of a worker's log; empty when the line is something else."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) and "event" in event else {}


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
        *python_command("services.cli.main", "worker", "--log-progress"),
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
                    # The workers' states are read from their log.
                    "KEEPWARM_LOG_LEVEL": "DEBUG" if settings.log_level == "DEBUG" else "INFO",
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
    return {
        "KEEPWARM_METRICS_ADDRESS": address if address == METRICS_OFF else any_port(address),
        "KEEPWARM_METRICS_ADVERTISE": advertised,
    }


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment with `changes`; None removes a variable."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}
