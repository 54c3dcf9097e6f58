import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contexts.engine_log import OOM
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineError, MessageTooNew, RunIncomplete, UsageError
from services.local import worker_processes as module
from services.local.worker_processes import WorkerProcess, device_shares, worker_processes
from services.node.device import Device

GENEROUS_SECONDS = 60.0
SLEEP = "import time; time.sleep(600)"

Starter = Callable[..., WorkerProcess]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    """A `WorkerProcess` whose command is a few lines of Python."""
    monkeypatch.setattr(module, "_LONGEST_PAUSE_SECONDS", 0.0)
    workers: list[WorkerProcess] = []

    def make(code: str) -> WorkerProcess:
        process = WorkerProcess(
            len(workers),
            [sys.executable, "-c", code],
            dict(os.environ),
            tmp_path / "worker.log",
            1.0,
        )
        workers.append(process)
        process.start()
        return process

    yield make
    for process in workers:
        process.stop()


def prints(*events: object, then: str = SLEEP) -> str:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return f"print({chr(10).join(lines)!r}, flush=True)\n{then}"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def replace_until_it_raises(process: WorkerProcess) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while time.monotonic() < deadline:
        process.replace_if_lost()


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([{"event": "worker.starting"}], "starting"),
        ([{"event": "engine.loading", "seconds": 12}], "loading the model, 12 s"),
        ([{"event": "worker.taking"}, {"event": "broker.connected"}], "working"),
        (
            [{"event": n} for n in ("worker.taking", "broker.waiting", "broker.connected")],
            "working",
        ),
        ([{"event": "worker.taking"}, {"event": "broker.waiting"}], "waiting for RabbitMQ"),
        ([{"event": "broker.connected"}], "starting the engine"),
        (
            [{"event": n} for n in ("worker.taking", "engine.died", "broker.connected")],
            "starting the engine",
        ),
        (
            [{"event": "worker.taking"}, {"event": "engine.died"}],
            "the engine stopped, restarting it",
        ),
        ([{"event": "worker.draining"}, "not JSON", "5", "[]", "{}"], "finishing"),
    ],
)
def test_the_state_is_the_workers_last_event(
    events: list[object], state: str, worker: Starter
) -> None:
    process = worker(prints(*events))
    wait_for(lambda: process.state == state)
    process.replace_if_lost()
    assert process.state == state


def test_all_output_of_a_worker_is_in_its_log(worker: Starter, tmp_path: Path) -> None:
    process = worker(prints({"event": "worker.taking"}, "and some words"))
    log = tmp_path / "worker.log"
    wait_for(lambda: process.state == "working" and "words" in log.read_text())
    assert log.read_text() == '{"event": "worker.taking"}\nand some words\n'


def test_output_that_is_malformed_or_cannot_be_logged_does_not_stop_the_worker(
    tmp_path: Path, worker: Starter
) -> None:
    (tmp_path / "worker.log").mkdir()  # no file can be written there
    odd = [
        *('{"event": ["a", "list"]}', '{"event": {}}', '{"event": null}'),
        *('{"event": "worker.progress"}', '{"event": "worker.progress", "answered": "many"}'),
    ]
    # More than a pipe holds: a worker whose output is not read would block here for ever.
    more = "print('x' * 1_000_000, flush=True)\n" + prints({"event": "worker.taking"})
    process = worker(prints(*odd, then=more))
    wait_for(lambda: process.state == "working")


def test_the_state_names_memory_when_the_kernel_killed_the_engine_for_it(worker: Starter) -> None:
    reason = f"it ended (exit code -9). {OOM}."
    process = worker(prints({"event": "worker.taking"}, {"event": "engine.died", "reason": reason}))
    wait_for(lambda: process.state.endswith("restarting it: memory ran out"))


def test_answers_are_counted_over_lost_workers_and_kept_out_of_the_log(
    worker: Starter, tmp_path: Path
) -> None:
    marker = tmp_path / "was-here"
    progress = json.dumps({"event": "worker.progress", "answered": 5})
    process = worker(
        f"import os, pathlib, signal\n"
        f"print({progress!r}, flush=True)\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists():\n"
        "    marker.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n" + prints({"event": "worker.taking"})
    )

    def counted() -> bool:
        process.replace_if_lost()
        return process.answered == 10

    wait_for(counted)
    assert process.losses == 1
    assert "worker.progress" not in (tmp_path / "worker.log").read_text()


def test_a_lost_worker_is_replaced(worker: Starter, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    process = worker(
        f"import os, pathlib, signal\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists():\n"
        "    marker.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n" + prints({"event": "worker.taking"})
    )

    def warm() -> bool:
        process.replace_if_lost()
        return process.state == "working"

    wait_for(warm)
    assert marker.exists()


def test_workers_that_are_lost_again_and_again_end_the_run(worker: Starter, tmp_path: Path) -> None:
    process = worker(prints("oh dear", then="raise SystemExit(33)"))
    with pytest.raises(RunIncomplete) as ended:
        replace_until_it_raises(process)
    assert "worker 0 was lost 5 times in a row (last exit code 33)" in str(ended.value)
    assert str(tmp_path / "worker.log") in str(ended.value)


def test_a_worker_that_is_too_old_for_the_claims_ends_the_run(worker: Starter) -> None:
    process = worker(prints("keepwarm: a ClaimBatch of version 3 came", then="raise SystemExit(9)"))
    with pytest.raises(MessageTooNew, match="a ClaimBatch of version 3 came"):
        replace_until_it_raises(process)


def test_a_worker_that_cannot_start_its_engine_ends_the_run_with_its_message(
    worker: Starter,
) -> None:
    process = worker(prints("keepwarm: no engine for this model", then="raise SystemExit(4)"))
    with pytest.raises(EngineError, match="^no engine for this model$"):
        replace_until_it_raises(process)


def test_the_last_output_of_a_worker_that_failed_is_read_to_its_end(
    worker: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.local.worker_processes._READ_OUTPUT_SECONDS", 60.0)
    # It ends while much of its output is still in the pipe.
    code = (
        "print('x\\n' * 30_000 + 'keepwarm: the reason comes last', flush=True)\n"
        "raise SystemExit(4)"
    )
    with pytest.raises(EngineError, match="the reason comes last$"):
        replace_until_it_raises(worker(code))


def test_stopping_ends_the_worker(worker: Starter) -> None:
    process = worker(prints({"event": "worker.taking"}))
    wait_for(lambda: process.state == "working")
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
        *("services.cli.main", "worker", "--log-progress"),
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


@pytest.mark.parametrize(("level", "workers"), [("ERROR", "INFO"), ("DEBUG", "DEBUG")])
def test_a_worker_logs_the_events_that_its_state_is_read_from(
    level: str, workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_LOG_LEVEL", level)
    monkeypatch.setenv("KEEPWARM_LOG_FORMAT", "console")
    found = environment(tmp_path)
    assert found["KEEPWARM_LOG_FORMAT"] == "json"
    assert found["KEEPWARM_LOG_LEVEL"] == workers


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
