"""The broker that a keeper keeps for the next run: lent, taken back, and thrown away."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.broker import BrokerAddress, Declares, Publisher
from services.broker.kept_node import KeptNode
from services.broker.private_node import PrivateNode
from services.contracts import load_settings, topology
from tests.integration.conftest import (
    PATIENCE,
    Command,
    clean_environment,
    send,
    wait_until,
)
from tests.integration.runs import wait_for_the_first_of
from tests.integration.test_run_command import CLAIMS, assert_one_row_a_claim

Start = Callable[..., Command]
CONTEXT = "ctx-test"
QUEUE = topology.claims_queue(CONTEXT)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptNode]:
    node = KeptNode(tmp_path / "node", tmp_path / "rabbitmq.log", idle_seconds=0.0)
    yield node
    node.close()


def lent(kept: KeptNode) -> PrivateNode:
    node = kept.acquire()
    assert node is not None
    return node


def make_queues(node: PrivateNode) -> None:
    settings = load_settings(broker_url=node.url, broker_password=node.password)
    declares = Declares("always", (CONTEXT,))
    address = BrokerAddress.from_settings(settings)
    Publisher(address, "house", window=1, declares=declares).open(PATIENCE).close()


def test_a_node_is_lent_to_one_at_a_time_and_stays_while_it_is_left_empty(kept: KeptNode) -> None:
    node = lent(kept)
    assert kept.acquire() is None
    make_queues(node)
    kept.release(QUEUE)
    assert kept.exists and lent(kept) is node and node.alive


def test_a_node_that_was_not_used_stays(kept: KeptNode) -> None:
    node = lent(kept)
    kept.release(None)
    assert lent(kept) is node


def test_a_node_with_something_left_in_it_is_thrown_away(kept: KeptNode, tmp_path: Path) -> None:
    node = lent(kept)
    make_queues(node)
    send(node, topology.CLAIMS_EXCHANGE, QUEUE, b"left over")
    kept.release(QUEUE)
    assert not kept.exists and not node.alive and not (tmp_path / "node").exists()
    assert lent(kept) is not node


def test_a_node_whose_queues_are_not_there_is_thrown_away(kept: KeptNode) -> None:
    lent(kept)
    kept.release(QUEUE)
    assert not kept.exists


def test_a_node_whose_user_is_gone_without_a_word_is_thrown_away(kept: KeptNode) -> None:
    node = lent(kept)
    kept.discard()
    assert not kept.exists and not node.alive


def test_a_node_that_is_killed_while_it_is_lent_comes_back_with_its_queues(kept: KeptNode) -> None:
    node = lent(kept)
    process = node.process()
    assert process is not None
    process.terminate()
    wait_until(lambda: not node.alive, "its end")
    kept.restart_if_down()
    assert node.alive


def test_a_node_ends_when_nobody_has_used_it_for_its_time(kept: KeptNode) -> None:
    lent(kept)
    kept.end_if_idle()
    assert kept.exists  # it is in use
    kept.release(None)
    kept.end_if_idle()
    assert not kept.exists


def test_at_the_end_nothing_is_lent_any_more(kept: KeptNode) -> None:
    node = lent(kept)
    kept.close()
    assert not node.alive and kept.acquire() is None


# With a keeper, and whole runs.


@pytest.fixture
def environment(small_model: Path, doubles_python: Path, runtime_dir: Path) -> dict[str, str]:
    """A machine without any broker."""
    return {
        **clean_environment(),
        "KEEPWARM_ENGINE_PYTHON": str(doubles_python),
        "KEEPWARM_MODEL": str(small_model),
        "KEEPWARM_RUNTIME_DIR": str(runtime_dir),
        "KEEPWARM_CACHE_DIR": str(runtime_dir.parent / "cache"),
        "KEEPWARM_GRACE_SECONDS": "6",
        "KEEPWARM_LOG_FORMAT": "json",
    }


def nodes(environment: dict[str, str]) -> set[int]:
    """The Erlang nodes that have their data in the cache directory."""
    found = set()
    for process in psutil.process_iter():
        try:
            if "beam" in process.name() and process.environ().get("HOME", "").startswith(
                environment["KEEPWARM_CACHE_DIR"]
            ):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def test_runs_on_a_node_with_a_keeper_share_its_broker_one_after_the_other(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    assert command("contexts", "warm").wait() == 0
    warm = nodes(environment)
    assert len(warm) == 1
    for number in (1, 2):
        out = tmp_path / f"out-{number}"
        running = command("run", CLAIMS, "--out", str(out))
        assert running.wait() == 0, running.output
        assert_one_row_a_claim(out)
        assert not (out / ".broker").exists()
        wait_until(lambda: nodes(environment) == warm, "the same node")
        report = json.loads((out / "report.json").read_text())
        assert report["status"]["duplicates"] == 0
    assert command("contexts", "evict", "--all").wait() == 0
    wait_until(lambda: not nodes(environment), "no node")


def test_two_runs_at_once_have_a_broker_each(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    assert command("contexts", "warm").wait() == 0
    outs = [tmp_path / "out-1", tmp_path / "out-2"]
    both = [
        command("run", CLAIMS, "--out", str(out), VLLM_TEST_CLAIM_SECONDS="0.01") for out in outs
    ]
    for running, out in zip(both, outs, strict=True):
        assert running.wait() == 0, running.output
        assert_one_row_a_claim(out)


def test_a_run_goes_on_when_the_run_whose_keeper_it_used_has_ended(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    slow = {"VLLM_TEST_CLAIM_SECONDS": "0.05"}
    outs = [tmp_path / "out-1", tmp_path / "out-2"]
    first = command("run", CLAIMS, "--out", str(outs[0]), "--batch-size", "8", **slow)
    wait_for_the_first_of(outs[0])
    second = command("run", CLAIMS, "--out", str(outs[1]), "--batch-size", "8", **slow)
    wait_for_the_first_of(outs[1])
    for running, out in ((first, outs[0]), (second, outs[1])):
        assert running.wait() == 0, running.output
        assert_one_row_a_claim(out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_broken_off_leaves_nothing_to_the_next(
    number: int, command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    slow = {"VLLM_TEST_CLAIM_SECONDS": "0.05"}
    assert command("contexts", "warm", **slow).wait() == 0
    before = nodes(environment)
    out = tmp_path / "out"
    running = command("run", CLAIMS, "--out", str(out), "--batch-size", "8", **slow)
    wait_for_the_first_of(out)
    os.kill(running.process.pid, number)
    running.wait()
    wait_until(lambda: not nodes(environment) & before, "the node thrown away")
    other = tmp_path / "other"
    again = command("run", CLAIMS, "--limit", "20", "--out", str(other))
    assert again.wait() == 0, again.output
    listed = command("status", "--json", "--store", str(other / "keepwarm.sqlite"))
    assert listed.wait() == 0
    assert len(json.loads(listed.output)) == 1  # and no verdict of the run before


def test_a_keeper_that_is_killed_ends_the_run_that_has_its_broker(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    keeper = command("keeper")
    keeper.said("keeper.ready")
    out = tmp_path / "out"
    slow = {"VLLM_TEST_CLAIM_SECONDS": "0.1"}
    running = command("run", CLAIMS, "--out", str(out), "--batch-size", "8", **slow)
    wait_for_the_first_of(out)
    keeper.signal(signal.SIGKILL)
    assert running.wait() == 5
    assert "rerun the command to resume" in running.output
    again = command("run", CLAIMS, "--out", str(out), "--batch-size", "8")
    assert again.wait() == 0, again.output
    assert_one_row_a_claim(out)
