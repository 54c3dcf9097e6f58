"""Versions side by side: the next one is this one with messages changed, see `newer_keepwarm`."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.broker import BrokerAddress, Outgoing, PrivateNode, Publisher
from services.contracts import ClaimBatch, RunAnnouncement, decode, encode, topology
from services.contracts.wire import VERSION
from tests.integration.conftest import (
    PATIENCE,
    Command,
    messages_in,
    plain_connection,
    wait_for_messages,
    wait_until,
)
from tests.integration.runs import (
    CLAIMS,
    assert_complete,
    context_of,
    end_well,
    outcomes,
    status_of,
    submit,
)

Start = Callable[..., Command]
NEWER = str(Path(__file__).parents[1] / "doubles" / "newer_keepwarm.py")
NEEDS = {"NEWER_NEEDS": "1"}


class NewerCommand(Command):
    program = (NEWER,)


@pytest.fixture
def newer(environment: dict[str, str]) -> Iterator[Start]:
    """Starts commands of the next version."""
    started: list[Command] = []

    def start(*arguments: str, **variables: str) -> Command:
        started.append(
            NewerCommand({**environment, **variables}, *arguments, python=sys.executable)
        )
        return started[-1]

    yield start
    for each in started:
        each.end()


def nothing_is_dead(node: PrivateNode) -> bool:
    return messages_in(node, topology.DEAD_MESSAGES_QUEUE) == 0


@pytest.mark.parametrize("producer", ["this", "next"])
@pytest.mark.parametrize("worker", ["this", "next"])
@pytest.mark.parametrize("collector", ["this", "next"])
def test_a_run_is_complete_and_proven_whichever_version_each_service_has(
    producer: str,
    worker: str,
    collector: str,
    command: Start,
    newer: Start,
    environment: dict[str, str],
    node: PrivateNode,
) -> None:
    """As long as nobody has to know what the newer one added."""
    start = {"this": command, "next": newer}
    run_id = submit(start[producer])
    collecting = start[collector]("collect", "--until", run_id)
    working = start[worker]("worker")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    status = status_of(environment, run_id)
    assert status is not None and status.proven is True
    end_well(working)
    assert nothing_is_dead(node)


def test_who_is_too_old_for_a_message_leaves_it_to_newer_ones_and_ends(
    command: Start, newer: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    run_id = submit(newer, **NEEDS)
    collecting, working = command("collect"), command("worker")
    for service in (collecting, working):
        assert service.wait() == 9, service.output
        said = " ".join(service.output.split())
        assert f"of version {VERSION + 1} came, and this Keepwarm reads up to {VERSION}" in said
    # All of it is where it was.
    wait_for_messages(node, topology.RUNS_QUEUE, 2, "both announcements")
    wait_for_messages(node, topology.claims_queue(context_of(working)), 15, "all batches")
    assert nothing_is_dead(node)
    working = newer("worker", **NEEDS)
    collecting = newer("collect", "--until", run_id, **NEEDS)
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    end_well(working)
    assert nothing_is_dead(node)


def test_a_worker_in_the_midst_of_a_run_finishes_its_batches_before_it_ends(
    command: Start, newer: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    run_id = submit(command)
    collecting = newer("collect", **NEEDS)
    working = command("worker", VLLM_TEST_CLAIM_SECONDS="0.02")
    wait_until(lambda: outcomes(environment), "the first verdicts")
    other = submit(newer, CLAIMS, "--limit", "64", **NEEDS)
    assert working.wait() == 9, working.output
    heir = newer("worker", **NEEDS)
    for run, total in ((run_id, 240), (other, 64)):
        wait_until(lambda run=run: _complete(environment, run), "the run's end")
        status = status_of(environment, run)
        assert status is not None and (status.total, status.proven) == (total, True)
    end_well(heir, collecting)
    assert nothing_is_dead(node)


def _complete(environment: dict[str, str], run_id: str) -> bool:
    status = status_of(environment, run_id)
    return status is not None and status.complete


def test_what_version_1_left_in_the_queues_is_answered_and_reported_as_unproven(
    command: Start, environment: dict[str, str], node: PrivateNode, address: BrokerAddress
) -> None:
    """Batches and announcements without proofs, and a worker that returns some of them."""
    submitting = command("submit", CLAIMS, "--batch-size", "16")
    assert submitting.wait() == 0, submitting.output
    run_id = submitting.lines[-1].strip()
    connection = plain_connection(node)
    channel = connection.channel()
    older: list[Outgoing] = []
    while (got := channel.basic_get(topology.RUNS_QUEUE, auto_ack=True))[0] is not None:
        announcement = decode(RunAnnouncement, got[2])
        plain = announcement.model_copy(
            update={"schema_version": 1, "proof_key": None, "digest": None, "positions": None}
        )
        older.append(Outgoing.of(plain, topology.RUNS_EXCHANGE, topology.RUNS_QUEUE))
    queue = topology.claims_queue(announcement.run.context.context_id)
    while (got := channel.basic_get(queue, auto_ack=True))[0] is not None:
        batch = decode(ClaimBatch, got[2])
        plain = batch.model_copy(update={"schema_version": 1, "proofs": ()})
        assert b"proof" not in encode(plain) and b'"schema_version":1' in encode(plain)
        older.append(Outgoing.of(plain, topology.CLAIMS_EXCHANGE, queue))
    connection.close()
    with Publisher(address, "test", window=100).open(PATIENCE) as publisher:
        for message in older:
            publisher.publish(message)
        publisher.flush(PATIENCE)
    collecting = command("collect", "--until", run_id)
    # One batch at a time, which takes longer than its grace: it returns a part.
    slow = {"KEEPWARM_BATCHES_IN_FLIGHT": "1", "KEEPWARM_GRACE_SECONDS": "3"}
    first = command("worker", VLLM_TEST_CLAIM_SECONDS="0.4", **slow)
    wait_until(lambda: outcomes(environment), "the first verdicts")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.output
    collecting.said("claims.returned")
    heir = command("worker")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    status = status_of(environment, run_id)
    assert status is not None and (status.complete, status.proven) == (True, None)
    shown = command("status")
    assert shown.wait() == 0 and "complete, unproven" in shown.output, shown.output
    # Sent once more, by the same file, it is proven: nothing is computed again.
    again = command("submit", CLAIMS)
    assert again.wait() == 0 and "0 of 240 claims are sent to the broker" in again.output, (
        again.output
    )
    collecting = command("collect")  # for a run that has all its outcomes `--until` ends at once
    wait_until(lambda: status_of(environment, run_id).proven, "the proof")
    end_well(heir, collecting)
    assert nothing_is_dead(node)
