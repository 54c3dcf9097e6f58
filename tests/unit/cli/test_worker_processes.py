import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.cli import worker_processes as module
from services.cli.worker_processes import WorkerProcess, device_shares, worker_processes
from services.contexts.engine_log import OOM
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import EngineError, MessageTooNew, RunIncomplete, UsageError
from services.node.device import Device

GENEROUS_SECONDS = 60.0
SLEEP = "import time; time.sleep(600)"

Starter = Callable[..., WorkerProcess]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    """A slot whose worker is a few lines of Python."""
    monkeypatch.setattr(module, "_LONGEST_PAUSE_SECONDS", 0.0)
    slots: list[WorkerProcess] = []

    def make(code: str) -> WorkerProcess:
        slot = WorkerProcess(
            len(slots), [sys.executable, "-c", code], dict(os.environ), tmp_path / "worker.log", 1.0
        )
        slots.append(slot)
        slot.start()
        return slot

    yield make
    for slot in slots:
        slot.stop()


def says(*events: object, then: str = SLEEP) -> str:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return f"print({chr(10).join(lines)!r}, flush=True)\n{then}"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def look_after_until_it_raises(slot: WorkerProcess) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while time.monotonic() < deadline:
        slot.look_after()


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
            "the engine stopped, starting it again",
        ),
        ([{"event": "worker.draining"}, "not JSON", "5", "[]", "{}"], "finishing"),
    ],
)
def test_the_state_is_what_the_worker_said_last(
    events: list[object], state: str, worker: Starter
) -> None:
    slot = worker(says(*events))
    wait_for(lambda: slot.state == state)
    slot.look_after()
    assert slot.state == state


def test_all_that_a_worker_says_is_in_its_log(worker: Starter, tmp_path: Path) -> None:
    slot = worker(says({"event": "worker.taking"}, "and some words"))
    log = tmp_path / "worker.log"
    wait_for(lambda: slot.state == "working" and "words" in log.read_text())
    assert log.read_text() == '{"event": "worker.taking"}\nand some words\n'


def test_what_makes_no_sense_or_cannot_be_logged_does_not_stop_the_worker(
    tmp_path: Path, worker: Starter
) -> None:
    (tmp_path / "worker.log").mkdir()  # no file can be written there
    odd = [
        *('{"event": ["a", "list"]}', '{"event": {}}', '{"event": null}'),
        *('{"event": "worker.progress"}', '{"event": "worker.progress", "answered": "many"}'),
    ]
    # More than a pipe holds: a worker whose words nobody reads would wait here for ever.
    more = "print('x' * 1_000_000, flush=True)\n" + says({"event": "worker.taking"})
    slot = worker(says(*odd, then=more))
    wait_for(lambda: slot.state == "working")


def test_an_engine_that_the_kernel_killed_for_memory_is_told_so(worker: Starter) -> None:
    reason = f"it ended (exit code -9). {OOM}."
    slot = worker(says({"event": "worker.taking"}, {"event": "engine.died", "reason": reason}))
    wait_for(lambda: slot.state.endswith("starting it again: memory ran out"))


def test_answers_are_counted_over_lost_workers_and_kept_out_of_the_log(
    worker: Starter, tmp_path: Path
) -> None:
    marker = tmp_path / "was-here"
    progress = json.dumps({"event": "worker.progress", "answered": 5})
    slot = worker(
        f"import os, pathlib, signal\n"
        f"print({progress!r}, flush=True)\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists():\n"
        "    marker.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n" + says({"event": "worker.taking"})
    )

    def counted() -> bool:
        slot.look_after()
        return slot.answered == 10

    wait_for(counted)
    assert slot.losses == 1
    assert "worker.progress" not in (tmp_path / "worker.log").read_text()


def test_a_lost_worker_is_replaced(worker: Starter, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    slot = worker(
        f"import os, pathlib, signal\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists():\n"
        "    marker.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n" + says({"event": "worker.taking"})
    )

    def warm() -> bool:
        slot.look_after()
        return slot.state == "working"

    wait_for(warm)
    assert marker.exists()


def test_workers_that_are_lost_again_and_again_end_the_run(worker: Starter, tmp_path: Path) -> None:
    slot = worker(says("oh dear", then="raise SystemExit(33)"))
    with pytest.raises(RunIncomplete) as ended:
        look_after_until_it_raises(slot)
    assert "worker 0 was lost 5 times in a row (last exit code 33)" in str(ended.value)
    assert str(tmp_path / "worker.log") in str(ended.value)


def test_a_worker_that_is_too_old_for_the_claims_ends_the_run(worker: Starter) -> None:
    slot = worker(says("keepwarm: a ClaimBatch of version 3 came", then="raise SystemExit(9)"))
    with pytest.raises(MessageTooNew, match="a ClaimBatch of version 3 came"):
        look_after_until_it_raises(slot)


def test_a_worker_that_gave_up_on_its_engine_ends_the_run_with_its_words(
    worker: Starter,
) -> None:
    slot = worker(says("keepwarm: no engine for this model", then="raise SystemExit(4)"))
    with pytest.raises(EngineError, match="^no engine for this model$"):
        look_after_until_it_raises(slot)


def test_the_words_of_a_worker_that_gave_up_are_read_to_their_end(
    worker: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.worker_processes._LAST_WORDS_SECONDS", 60.0)
    # It ends while much of what it said is still in the pipe.
    code = (
        "print('x\\n' * 30_000 + 'keepwarm: the reason comes last', flush=True)\n"
        "raise SystemExit(4)"
    )
    with pytest.raises(EngineError, match="the reason comes last$"):
        look_after_until_it_raises(worker(code))


def test_stopping_ends_the_worker(worker: Starter) -> None:
    slot = worker(says({"event": "worker.taking"}))
    wait_for(lambda: slot.state == "working")
    slot.terminate()
    slot.stop()
    slot.stop()
    slot.terminate()


# Their shares, commands and environments.

CPU = Device("cpu", "Xeon", 2**34, (0, 1, 2, 3, 4))
GPU = Device("cuda", "H100", 2**36, (0, 1))


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "cuda"])
def test_one_worker_has_the_whole_node(device: Device) -> None:
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


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    found = device_shares(2, GPU)
    assert found == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match="--workers 2: this process may use 1 GPUs"):
        device_shares(2, GPU)


def environment(
    directory: Path,
    share: dict[str, str] | None = None,
    broker: dict[str, str | None] | None = None,
) -> dict[str, str]:
    (slot,) = worker_processes(
        [share or {}], ContextSpec(model="/m"), load_settings(), directory / "logs", broker or {}
    )
    return dict(slot._environment)


def test_a_worker_serves_the_very_context_of_the_run(tmp_path: Path, repository: Path) -> None:
    context = ContextSpec(
        model="/models/m",
        revision="files-00",
        dtype="float32",
        max_model_tokens=77,
        engine_arguments=("--seed=1", "--x y"),
        adapter="/adapters/a",
        adapter_revision="files-01",
    )
    (slot,) = worker_processes([{}], context, load_settings(), tmp_path / "logs", {})
    assert list(slot._command) == [
        *(sys.executable, "-E", "-P", "-Xutf8", str(repository / "keepwarm_start.py")),
        *("services.cli.main", "worker", "--log-progress"),
        *("--model", "/models/m", "--dtype", "float32", "--max-model-tokens", "77"),
        *("--revision", "files-00", "--adapter", "/adapters/a", "--adapter-revision", "files-01"),
        *("--engine-argument=--seed=1", "--engine-argument=--x y"),
    ]


def test_there_is_a_worker_for_each_share(tmp_path: Path) -> None:
    shares = [{"CUDA_VISIBLE_DEVICES": str(n)} for n in range(3)]
    slots = worker_processes(
        shares, ContextSpec(model="/m"), load_settings(), tmp_path / "logs", {}
    )
    assert [slot.number for slot in slots] == [0, 1, 2]
    assert [slot._environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "2"]
    assert len({slot._log_file for slot in slots}) == 3


def test_the_runs_own_broker_replaces_what_the_environment_says(
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
def test_a_workers_log_is_what_its_state_is_read_from(
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
def test_workers_serve_metrics_where_the_run_does_each_at_a_port_of_its_own(
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
