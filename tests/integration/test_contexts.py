"""Contexts that outlive workers: found, shared, kept, prepared, evicted, and never left behind."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import PATIENCE, Command, wait_until
from tests.integration.runs import (
    CLAIMS,
    assert_complete,
    begin,
    end_well,
    keepers,
    submit,
    warm_here,
)

Start = Callable[..., Command]


def the_engine(environment: dict[str, str]) -> psutil.Process:
    (record,) = warm_here(environment)
    assert record.state == "warm" and record.pid is not None
    engine = psutil.Process(record.pid)
    assert engine.create_time() == record.pid_started
    return engine


def the_keeper(environment: dict[str, str]) -> psutil.Process:
    (keeper,) = keepers(environment)
    return keeper


def keeper_log(environment: dict[str, str]) -> str:
    return (Path(environment["KEEPWARM_RUNTIME_DIR"]) / "keeper.log").read_text()


def end(process: psutil.Process, number: int) -> None:
    process.send_signal(number)
    process.wait(PATIENCE)


def test_workers_that_race_for_a_context_start_one_engine(
    command: Start, environment: dict[str, str]
) -> None:
    workers = [command("worker", VLLM_TEST_START_SECONDS="1") for _ in range(3)]
    for worker in workers:
        worker.said("worker.taking")
    (record,) = warm_here(environment)
    assert (record.attached, record.used) == (3, 3)
    assert keeper_log(environment).count('"context.starting"') == 1
    end_well(*workers)
    wait_until(lambda: warm_here(environment)[0].attached == 0, "all leases given back")


def test_workers_of_a_keeper_that_is_a_service_never_bring_their_own(
    command: Start, environment: dict[str, str]
) -> None:
    alone = {"KEEPWARM_START_KEEPER": "false"}
    worker = command("worker", **alone)  # before the keeper, as containers may start
    keeper = command("keeper")
    keeper.said("keeper.ready")
    worker.said("worker.taking")
    end_well(keeper)  # its engine goes with it; another keeper comes
    again = command("keeper")
    again.said("keeper.ready")
    worker.said("engine.ready", times=2)
    end_well(worker, again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_stays_for_the_next_worker_whatever_ends_the_first(
    command: Start, environment: dict[str, str], number: int
) -> None:
    first = command("worker")
    first.said("worker.taking")
    engine = the_engine(environment)
    first.signal(number)
    first.wait()
    second = command("worker")
    second.said('"warm": true')
    second.said("worker.taking")
    assert the_engine(environment) == engine
    end_well(second)


def test_a_worker_whose_keeper_and_engine_are_killed_has_others_and_loses_nothing(
    command: Start, environment: dict[str, str]
) -> None:
    run = begin(command, environment)
    engine, keeper = the_engine(environment), the_keeper(environment)
    end(keeper, signal.SIGKILL)
    engine.wait(PATIENCE)
    run.worker.said("engine.ready", times=2)
    run.completes()
    assert the_engine(environment) != engine


@pytest.mark.parametrize("victim", ["keeper", "guard", "supervisor", "fork server"])
def test_no_engine_stays_when_a_process_that_holds_it_is_killed(
    command: Start, environment: dict[str, str], victim: str
) -> None:
    assert command("contexts", "warm").wait() == 0
    engine, keeper = the_engine(environment), the_keeper(environment)
    fork_server, supervisor, guard = engine.parents()[2:5]
    family = [engine, fork_server, supervisor, guard]
    victims = {
        "keeper": keeper,
        "guard": guard,
        "supervisor": supervisor,
        "fork server": fork_server,
    }
    end(victims[victim], 9)
    wait_until(lambda: not any(alive(process) for process in family), "all of them gone")
    wait_until(lambda: not warm_here(environment), "no record")
    worker = command("worker")  # what is left is no obstacle
    worker.said("worker.taking")
    end_well(worker)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_engine_that_nobody_uses_is_stopped_and_one_in_use_is_not(
    command: Start, environment: dict[str, str]
) -> None:
    idle = {"KEEPWARM_CONTEXT_IDLE_SECONDS": "1"}
    worker = command("worker", **idle)
    worker.said("worker.taking")
    engine = the_engine(environment)
    time.sleep(2)
    assert engine.is_running()
    end_well(worker)
    wait_until(lambda: not engine.is_running(), "the engine gone")
    assert "no worker used it for 1 s" in keeper_log(environment)
    wait_until(lambda: not warm_here(environment), "its record gone too")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_keeper_that_finds_its_node_draining_stops_its_engines_and_ends(
    command: Start, environment: dict[str, str], number: int
) -> None:
    assert command("contexts", "warm").wait() == 0
    engine, keeper = the_engine(environment), the_keeper(environment)
    end(keeper, number)
    assert not engine.is_running()
    assert not warm_here(environment)
    left = {path.name for path in Path(environment["KEEPWARM_RUNTIME_DIR"]).iterdir()}
    assert left <= {"keeper.log", "keeper.lock", *(name for name in left if name.endswith(".log"))}


def test_a_keeper_lets_a_draining_worker_finish_with_its_engine(
    command: Start, environment: dict[str, str]
) -> None:
    run = begin(command, environment, KEEPWARM_GRACE_SECONDS="60")
    keeper = the_keeper(environment)
    keeper.terminate()
    end_well(run.worker)
    keeper.wait(PATIENCE)
    assert '"engine.died"' not in run.worker.output
    heir = command("worker")
    assert run.collecting.wait() == 0
    assert_complete(environment, run.run_id)
    end_well(heir)


def test_a_keeper_ends_before_its_walltime_does(
    command: Start, environment: dict[str, str]
) -> None:
    # Its drain begins 5 s after its start: whether there is an engine by then does not matter.
    times = {"KEEPWARM_WALLTIME_SECONDS": "12", "KEEPWARM_GRACE_SECONDS": "2"}
    command("contexts", "warm", **times)
    log = Path(environment["KEEPWARM_RUNTIME_DIR"]) / "keeper.log"
    wait_until(lambda: log.exists() and "walltime.ending" in log.read_text(), "its drain")
    wait_until(lambda: not keepers(environment), "its end")


def test_contexts_are_warmed_listed_logged_and_evicted_by_hand(
    command: Start, environment: dict[str, str]
) -> None:
    nothing = command("contexts", "list")
    assert nothing.wait() == 0
    assert "No engine is warm" in nothing.output

    warming = command("contexts", "warm")
    assert warming.wait() == 0, warming.output
    (record,) = warm_here(environment)
    assert warming.lines[-1].strip() == record.name

    listing = command("contexts", "list")
    assert listing.wait() == 0
    assert record.name in listing.output and "started in" in listing.output
    as_json = command("contexts", "list", "--json")
    assert as_json.wait() == 0
    told = json.loads(as_json.output)
    assert told["name"] == record.name and told["phases"]["total"] > 0
    assert told["memory_bytes"] > 0 and told["used"] == 1

    logging = command("contexts", "logs", record.context.context_id)
    assert logging.wait() == 0
    assert "the test engine is starting" in logging.output

    engine = the_engine(environment)
    evicting = command("contexts", "evict", record.name)
    assert evicting.wait() == 0, evicting.output
    assert evicting.output.strip() == record.name
    assert not engine.is_running() and not warm_here(environment)


def test_all_that_is_warm_can_be_let_go_at_once(
    command: Start, environment: dict[str, str]
) -> None:
    assert command("contexts", "warm").wait() == 0
    assert command("contexts", "warm", "--max-model-tokens", "512").wait() == 0
    assert len(warm_here(environment)) == 2
    keeper = the_keeper(environment)
    evicting = command("contexts", "evict", "--all")
    assert evicting.wait() == 0
    assert len(evicting.lines) == 2
    keeper.wait(PATIENCE)
    assert not warm_here(environment)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("evict",), "name engines, or use --all"),
        (("evict", "ctx-nothing"), "no engine's name begins with 'ctx-nothing'"),
        (("logs", "ctx-nothing"), "engines on this node: none"),
        (("evict", "--all", "ctx-1"), "--all takes no names"),
    ],
)
def test_a_context_that_is_not_there_is_reported_with_those_that_are(
    command: Start, arguments: tuple[str, ...], says: str
) -> None:
    asking = command("contexts", *arguments)
    assert asking.wait() == 2
    assert says in asking.output


def test_a_worker_starts_its_engine_again_after_an_eviction(
    command: Start, environment: dict[str, str]
) -> None:
    run = begin(command, environment)
    (record,) = warm_here(environment)
    assert command("contexts", "evict", record.name).wait() == 0
    run.completes()


def test_runs_with_other_prompts_share_the_engine(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("name: other\ninstructions: Is this so? Answer True, False or Unknown.\n")
    worker = command("worker")
    for more in ((), ("--prompt", str(prompt))):
        run_id = submit(command, CLAIMS, *more)
        collecting = command("collect", "--until", run_id)
        assert collecting.wait() == 0, collecting.output
    (record,) = warm_here(environment)
    assert record.used == 1
    assert keeper_log(environment).count('"context.starting"') == 1
    end_well(worker)


def test_a_run_uses_an_engine_that_is_warm_and_leaves_it_so(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    assert command("contexts", "warm").wait() == 0
    engine = the_engine(environment)
    desk = {"KEEPWARM_BROKER_URL": "", "KEEPWARM_BROKER_PASSWORD": "", "KEEPWARM_STORE_URL": ""}
    running = command("run", "samples/claims.jsonl", "--out", str(tmp_path / "out"), **desk)
    assert running.wait() == 0, running.output
    (record,) = warm_here(environment)
    assert record.used == 2 and the_engine(environment) == engine


def test_a_run_that_finds_nothing_warm_leaves_nothing_behind(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    desk = {"KEEPWARM_BROKER_URL": "", "KEEPWARM_BROKER_PASSWORD": "", "KEEPWARM_STORE_URL": ""}
    running = command("run", "samples/claims.jsonl", "--out", str(tmp_path / "out"), **desk)
    assert running.wait() == 0, running.output
    assert '"context.warm"' in (tmp_path / "out" / "logs" / "keeper.log").read_text()
    assert not warm_here(environment)
    assert not keepers(environment)


def test_the_keeper_and_its_engines_have_none_of_our_secrets(
    command: Start, environment: dict[str, str]
) -> None:
    worker = command("worker")
    worker.said("worker.taking")
    keeper = the_keeper(environment)
    password = environment["KEEPWARM_BROKER_PASSWORD"]
    for process in (keeper, *keeper.children(recursive=True)):
        assert password not in json.dumps(process.environ())
        assert Path(process.exe()).name.startswith("python")
    end_well(worker)
