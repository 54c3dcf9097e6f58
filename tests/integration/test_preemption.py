"""GPUs that are taken away: by a signal, by a kill, by a walltime, once or a hundred times."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from services.broker import BrokerAddress, Consumer, PrivateNode
from services.contracts import ClaimBatch, topology
from tests.integration.conftest import (
    PATIENCE,
    Command,
    cut,
    messages_in,
    wait_for_messages,
    wait_until,
)
from tests.integration.runs import (
    CLAIMS,
    SLOWLY,
    assert_complete,
    end_well,
    outcomes,
    status_of,
    submit,
    wait_for_the_first_verdicts,
)

Start = Callable[..., Command]
IN_HAND = 3 * 16  # batches in flight, and the claims of each


def claims_queue(node: PrivateNode, worker: Command) -> str:
    worker.said("worker.starting")
    line = next(line for line in worker.lines if '"worker.starting"' in line)
    return topology.claims_queue(line.partition('"context": "')[2].partition('"')[0])


@pytest.fixture
def journal(environment: dict[str, str], tmp_path: Path) -> Callable[[], Counter[str]]:
    """How often the engines have answered each prompt."""
    path = tmp_path / "journal"
    environment["VLLM_TEST_JOURNAL"] = str(path)

    def read() -> Counter[str]:
        return Counter(path.read_text().split()) if path.exists() else Counter()

    return read


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_drain_publishes_what_is_answered_and_returns_only_the_rest(
    command: Start,
    environment: dict[str, str],
    journal: Callable[[], Counter[str]],
    number: int,
) -> None:
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    # 48 claims in hand take 24 s, and the drain has half of 20 s.
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="0.5", KEEPWARM_GRACE_SECONDS="20")
    wait_until(lambda: sum(journal().values()) > 3, "some answers in the midst of batches")
    worker.signal(number)
    assert worker.wait() == 0, worker.output
    answered = sum(journal().values())
    wait_until(
        lambda: len(outcomes(environment)) == answered, "all that was answered, in the store"
    )
    assert 0 < answered < IN_HAND
    heir = command("worker")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    computed = journal()
    assert len(computed) == 240 and set(computed.values()) == {1}  # not one of them twice
    status = status_of(environment, run_id)
    assert status is not None and status.duplicates == 0
    assert 0 < status.returned <= IN_HAND - answered
    end_well(heir)


def test_sigterm_after_an_early_warning_is_the_first_of_its_kind(
    command: Start, node: PrivateNode
) -> None:
    submit(command)
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="1", KEEPWARM_GRACE_SECONDS="6")
    wait_for_messages(node, claims_queue(node, worker), 12, "three taken")
    worker.signal(signal.SIGUSR1)
    worker.said("worker.draining")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.output


@pytest.mark.parametrize("by", ["setting", "slurm"])
def test_a_worker_drains_by_itself_before_its_walltime_ends(
    command: Start, node: PrivateNode, by: str
) -> None:
    submit(command)
    end = (
        {"KEEPWARM_WALLTIME_SECONDS": "9"}
        if by == "setting"
        else {"SLURM_JOB_END_TIME": str(int(time.time()) + 10)}
    )
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="1", KEEPWARM_GRACE_SECONDS="2", **end)
    assert worker.wait() == 0, worker.output
    assert "walltime.ending" in worker.output
    waiting = messages_in(node, claims_queue(node, worker))
    assert waiting + messages_in(node, topology.RETURNS_QUEUE) >= 12


def test_a_kill_costs_at_most_what_was_in_hand_and_never_changes_the_store(
    command: Start, environment: dict[str, str], journal: Callable[[], Counter[str]]
) -> None:
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    worker = command("worker", **SLOWLY)
    wait_for_the_first_verdicts(collecting, environment)
    before = {claim: (label, reason) for claim, label, reason in outcomes(environment)}
    os.killpg(worker.process.pid, signal.SIGKILL)
    worker.wait()
    heir = command("worker")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    after = {claim: (label, reason) for claim, label, reason in outcomes(environment)}
    assert before.items() <= after.items()
    again = sum(journal().values()) - len(journal())
    status = status_of(environment, run_id)
    assert status is not None and again <= status.lost_work <= IN_HAND
    end_well(heir)


def test_a_batch_that_was_preempted_a_hundred_times_is_answered_like_any_other(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    address: BrokerAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.broker.link._FIRST_DELAY_SECONDS", 0.01)  # of the victim's
    run_id = submit(command, CLAIMS, "--limit", "16")
    worker = command("worker", VLLM_TEST_START_SECONDS="600")  # only to hear the queue's name
    queue = claims_queue(node, worker)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    with Consumer(address, "victim", queues=[queue], prefetch=1).open(PATIENCE) as victim:
        for attempt in range(1, 101):
            delivery = victim.take(PATIENCE)
            assert delivery is not None and delivery.attempt == attempt
            assert delivery.failures == 0 and delivery.message(ClaimBatch)
            cut(victim)
        assert victim.take(PATIENCE)
    collecting = command("collect", "--until", run_id)
    heir = command("worker")
    assert collecting.wait() == 0, collecting.output
    found = outcomes(environment)
    assert len(found) == 16 and all(label for _, label, _ in found)
    assert messages_in(node, topology.DEAD_MESSAGES_QUEUE) == 0
    end_well(heir)
