import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contracts import ContextSpec, WorkerHeartbeat, load_settings
from services.contracts.errors import EngineError, MessageTooNew, RunIncomplete, UsageError
from services.local import worker_processes as module
from services.local.worker_processes import WorkerProcess, device_shares, worker_processes
from services.node.device import Device
from tests.unit.clock import Clock

GENEROUS_SECONDS = 60.0
SLEEP = "import time; time.sleep(600)"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"

Starter = Callable[..., WorkerProcess]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    """A `WorkerProcess` whose command is a few lines of Python."""
    monkeypatch.setattr(module, "_LONGEST_PAUSE_SECONDS", 0.0)
    workers: list[WorkerProcess] = []

    def make(code: str = SLEEP, log_file: Path = tmp_path / "worker.log") -> WorkerProcess:
        process = WorkerProcess(
            len(workers), [sys.executable, "-c", code], dict(os.environ), log_file, 1.0
        )
        workers.append(process)
        process.start()
        return process

    yield make
    for process in workers:
        process.stop()


def heartbeat(process: WorkerProcess, state: str = "serving", **changes: object) -> WorkerHeartbeat:
    fields: dict[str, object] = {
        "worker_id": process.worker_id,
        "context_id": "ctx-1",
        "device": "Tesla T4",
        "state": state,
        "claims_per_second": None,
    }
    return WorkerHeartbeat(**{**fields, **changes})  # type: ignore[arg-type]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def replace_until_it_raises(process: WorkerProcess) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while time.monotonic() < deadline:
        process.replace_if_lost()
        time.sleep(0.01)


def wait_for_a_loss(process: WorkerProcess) -> None:
    losses = process.losses

    def lost() -> bool:
        process.replace_if_lost()
        return process.losses > losses

    wait_for(lost)


@pytest.mark.parametrize(
    ("state", "reason", "shown"),
    [
        ("starting", None, "loading the model, 12 s"),
        ("starting", "engine-ended", "the engine stopped, restarting it, 12 s"),
        (
            "starting",
            "out-of-memory",
            "the engine stopped because memory ran out, restarting it, 12 s",
        ),
        ("serving", None, "working"),
        ("draining", None, "finishing"),
    ],
)
def test_the_state_is_that_of_the_workers_heartbeats(
    state: str, reason: str | None, shown: str, worker: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    process = worker()
    process.update(None, None)
    assert process.state == "starting"
    for pause in (100, 5, 7):
        clock.now += pause
        process.update(heartbeat(process, state, restart_reason=reason), None)
    process.replace_if_lost()
    assert process.state == shown


def test_the_time_of_a_restart_is_not_that_of_the_first_start(
    worker: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    process = worker()
    for state in ("starting", "serving", "starting"):
        clock.now += 30
        process.update(heartbeat(process, state), None)
    assert process.state == "loading the model, 0 s"


def test_without_the_broker_the_state_is_why_no_heartbeat_comes(worker: Starter) -> None:
    process = worker()
    process.update(None, "no connection to the broker")
    assert process.state == "waiting: no connection to the broker"
    process.update(heartbeat(process), "the broker blocks publishing: low on memory")
    assert process.state == "waiting: the broker blocks publishing: low on memory"
    process.update(heartbeat(process), None)
    assert process.state == "working"


def test_a_worker_that_is_not_heard_of_for_a_while_is_shown_as_it_was(worker: Starter) -> None:
    process = worker()
    process.update(heartbeat(process, claims_answered=3), None)
    process.update(None, None)
    assert (process.state, process.answered) == ("working", 3)


def test_answers_are_counted_over_lost_workers(worker: Starter) -> None:
    process = worker(DIES)
    for lost in range(3):
        for answered in (2, 5):
            process.update(heartbeat(process, claims_answered=answered), None)
            assert process.answered == 5 * lost + answered
        wait_for_a_loss(process)
        assert process.answered == 5 * (lost + 1)
        assert process.state.startswith("ended with exit code -9, starting another in ")
        process.replace_if_lost()


def test_a_worker_that_replaces_a_lost_one_has_another_id(worker: Starter) -> None:
    """The last heartbeat of the lost one is still known."""
    process = worker(DIES)
    first = process.worker_id
    wait_for_a_loss(process)
    process.replace_if_lost()
    assert process.state == "starting" and process.worker_id not in ("", first)


def test_a_worker_gets_its_id(worker: Starter, tmp_path: Path) -> None:
    process = worker("import sys; print(sys.argv[1:])")
    told = f"['--watched-as', '{process.worker_id}']"
    wait_for(lambda: told in (tmp_path / "worker.log").read_text())
    assert heartbeat(process).worker_id == process.worker_id  # a valid id


def test_all_output_of_the_workers_is_in_the_log(worker: Starter, tmp_path: Path) -> None:
    code = "import sys; print('{\"event\": \"a\"}', flush=True); print('b', file=sys.stderr)\n"
    process = worker(code + DIES)
    wait_for_a_loss(process)
    process.replace_if_lost()
    wait_for_a_loss(process)
    assert (tmp_path / "worker.log").read_text() == '{"event": "a"}\nb\n' * 2


@pytest.mark.parametrize("log_file", ["/proc/no/such.log", "/dev/full"])
def test_a_log_that_cannot_be_written_does_not_stop_the_worker(
    log_file: str, worker: Starter, repository: Path
) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        "import structlog\n"
        "from services.cli.logs import configure_logs\n"
        "from services.cli.process import make_streams_robust\n"
        "from services.contracts import load_settings\n"
        "make_streams_robust()\n"
        "configure_logs(load_settings())\n"
        "for _ in range(10_000):\n"
        "    structlog.get_logger().info('batch.trimmed')\n"
        "raise SystemExit(33)"
    )
    process = worker(code, Path(log_file))
    wait_for_a_loss(process)
    assert process.state.startswith("ended with exit code 33")


def test_an_error_ends_the_run_though_its_message_could_not_be_logged(worker: Starter) -> None:
    log_file = Path("/proc/no/such.log")
    with pytest.raises(EngineError, match="^see /proc/no/such.log$"):
        replace_until_it_raises(worker("print('no engine'); raise SystemExit(4)", log_file))


def test_a_lost_worker_is_replaced(worker: Starter, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    process = worker(
        f"import pathlib\nmarker = pathlib.Path({str(marker)!r})\n"
        f"if marker.exists():\n    {SLEEP}\nmarker.touch()\n{DIES}"
    )
    wait_for_a_loss(process)
    process.replace_if_lost()
    process.update(heartbeat(process), None)
    assert process.state == "working" and marker.exists()


def test_workers_that_are_lost_again_and_again_end_the_run(worker: Starter, tmp_path: Path) -> None:
    process = worker("print('oh dear'); raise SystemExit(33)")
    with pytest.raises(RunIncomplete) as ended:
        replace_until_it_raises(process)
    assert "worker 0 was lost 5 times in a row (last exit code 33)" in str(ended.value)
    assert f"the log is {tmp_path}/worker.log, and the last lines are:\noh dear" in str(ended.value)


def test_losses_with_a_warm_worker_in_between_are_not_in_a_row(worker: Starter) -> None:
    process = worker("raise SystemExit(33)")
    for _ in range(6):
        process.update(heartbeat(process), None)
        wait_for_a_loss(process)
        process.replace_if_lost()
    assert process.losses == 6


def test_a_worker_that_is_too_old_for_the_claims_ends_the_run(worker: Starter) -> None:
    process = worker("print('keepwarm: a ClaimBatch of version 3 came'); raise SystemExit(9)")
    with pytest.raises(MessageTooNew, match="^a ClaimBatch of version 3 came$"):
        replace_until_it_raises(process)


def test_a_worker_that_cannot_start_its_engine_ends_the_run_with_its_message(
    worker: Starter, tmp_path: Path
) -> None:
    (tmp_path / "worker.log").write_text("keepwarm: what another run ended with\n")
    process = worker(
        'print(\'{"event": "worker.stopped"}\')\n'
        "print('keepwarm: no engine for this model\\nits log')\n"
        "raise SystemExit(4)"
    )
    with pytest.raises(EngineError, match="^no engine for this model\nits log$"):
        replace_until_it_raises(process)


def test_of_much_output_the_last_lines_are_shown(worker: Starter) -> None:
    code = (
        "print('x\\n' * 1_000_000 + 'keepwarm: the reason comes last', flush=True)\n"
        "raise SystemExit(4)"
    )
    with pytest.raises(EngineError, match="^(x\n){39}keepwarm: the reason comes last$"):
        replace_until_it_raises(worker(code))


def test_stopping_ends_the_worker(worker: Starter) -> None:
    process = worker()
    process.terminate()
    process.stop()
    process.stop()
    process.terminate()


# Device shares, commands and environments.

CPU = Device("cpu", "Xeon", 2**34, (0, 1, 2, 3, 4))
GPU = Device("cuda", "H100", 2**36, (0, 1))


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "cuda"])
def test_one_worker_uses_the_whole_node(device: Device) -> None:
    assert device_shares(1, device) == [{}]


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ((0, 1, 2, 3, 4), 2, ["0,2,4", "1,3"]),
        ((4, 7), 2, ["4", "7"]),
        ((0, 1), 3, ["0", "1", "0,1"]),
    ],
)
def test_several_workers_share_the_cores(
    cores: tuple[int, ...], workers: int, shares: list[str]
) -> None:
    found = device_shares(workers, Device("cpu", "Xeon", 2**34, cores))
    assert found == [{"VLLM_CPU_OMP_THREADS_BIND": share} for share in shares]


def test_each_worker_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    found = device_shares(2, GPU)
    assert found == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match="--workers 2: .* its own GPU, .* may use 1"):
        device_shares(2, GPU)


def environment(
    directory: Path,
    share: dict[str, str] | None = None,
    broker: dict[str, str | None] | None = None,
) -> dict[str, str]:
    (process,) = worker_processes(
        [share or {}], ContextSpec(model="/m"), load_settings(), directory / "logs", broker or {}
    )
    return dict(process._environment)


def test_a_worker_serves_the_context_of_the_run(tmp_path: Path, repository: Path) -> None:
    context = ContextSpec(
        model="/models/m",
        revision="files-00",
        dtype="float32",
        max_model_tokens=77,
        engine_arguments=("--seed=1", "--x y"),
        adapter="/adapters/a",
        adapter_revision="files-01",
    )
    (process,) = worker_processes([{}], context, load_settings(), tmp_path / "logs", {})
    assert list(process._command) == [
        *(sys.executable, "-E", "-P", "-Xutf8", str(repository / "keepwarm_start.py")),
        *("services.cli.main", "worker"),
        *("--model", "/models/m", "--dtype", "float32", "--max-model-tokens", "77"),
        *("--revision", "files-00", "--adapter", "/adapters/a", "--adapter-revision", "files-01"),
        *("--engine-argument=--seed=1", "--engine-argument=--x y"),
    ]


def test_there_is_a_worker_for_each_share(tmp_path: Path) -> None:
    shares = [{"CUDA_VISIBLE_DEVICES": str(n)} for n in range(3)]
    workers = worker_processes(
        shares, ContextSpec(model="/m"), load_settings(), tmp_path / "logs", {}
    )
    assert [process.number for process in workers] == [0, 1, 2]
    assert [process._environment["CUDA_VISIBLE_DEVICES"] for process in workers] == ["0", "1", "2"]
    assert len({process._log_file for process in workers}) == 3


def test_the_runs_broker_replaces_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_BROKER_PASSWORD_FILE", "/run/secrets/other")
    monkeypatch.setenv("KEEPWARM_GRACE_SECONDS", "7")
    broker = {"KEEPWARM_BROKER_URL": "amqp://h", "KEEPWARM_BROKER_PASSWORD_FILE": None}
    found = environment(tmp_path, broker=broker)
    assert found["KEEPWARM_BROKER_URL"] == "amqp://h"
    assert "KEEPWARM_BROKER_PASSWORD_FILE" not in found
    assert found["KEEPWARM_GRACE_SECONDS"] == "7"


def test_a_worker_logs_as_json_at_the_runs_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("KEEPWARM_LOG_FORMAT", "console")
    found = environment(tmp_path)
    assert found["KEEPWARM_LOG_FORMAT"] == "json"
    assert found["KEEPWARM_LOG_LEVEL"] == "ERROR"


@pytest.mark.parametrize(
    ("address", "advertised", "workers"),
    [
        (None, None, ("127.0.0.1:0", None)),
        ("off", None, ("off", None)),
        ("0.0.0.0:9464", "node-7", ("0.0.0.0:0", "node-7")),
        ("[::]:9464", "node-7:80", ("[::]:0", "node-7")),
    ],
)
def test_workers_serve_metrics_at_the_runs_address_each_at_its_own_port(
    address: str | None,
    advertised: str | None,
    workers: tuple[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("ADDRESS", address), ("ADVERTISE", advertised)):
        if value is not None:
            monkeypatch.setenv(f"KEEPWARM_METRICS_{name}", value)
    found = environment(tmp_path)
    assert found["KEEPWARM_METRICS_ADDRESS"] == workers[0]
    assert found.get("KEEPWARM_METRICS_ADVERTISE") == workers[1]
