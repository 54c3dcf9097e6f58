"""The worker as a process, with the tests' engine: verdicts, faults and every way to die."""

import json
import os
import signal
import stat
from pathlib import Path

import psutil
import pytest

from services.broker import BrokerAddress, Consumer, Delivery, PrivateNode
from services.contracts import (
    ClaimBatch,
    DeadClaim,
    VerdictBatch,
    decode,
    load_settings,
    topology,
)
from services.store import Store, dead_claims
from tests.conftest import sample_lines
from tests.integration.conftest import (
    PATIENCE,
    Command,
    messages_in,
    send,
    wait_for_messages,
    wait_until,
)
from tests.integration.runs import (
    CLAIMS,
    SLOWLY,
    Start,
    assert_complete,
    context_of,
    held,
    hurry,
    outcomes,
    submit,
    wait_for_the_first_verdicts,
    warm_here,
)


def take(address: BrokerAddress, queue: str, count: int) -> list[Delivery]:
    """`count` messages from a queue, acknowledged; what workers say of their start not counted."""
    with Consumer(address, "test", queues=[queue], prefetch=50).open(PATIENCE) as consumer:
        deliveries = []
        while len(deliveries) < count and (delivery := consumer.take(PATIENCE)) is not None:
            if delivery.kind != "ContextReady":
                deliveries.append(delivery)
            consumer.acknowledge([delivery])
        return deliveries


def dead_of(environment: dict[str, str]) -> tuple[str, str]:
    """Run and id of the one dead claim in the store."""
    store = Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"]))
    (row,) = dead_claims(store)
    store.close()
    return row.run_id, row.claim.claim_id


def collect(command: Start, run_id: str) -> Command:
    return command("collect", "--until", run_id)


def test_every_claim_of_a_batch_gets_a_verdict_that_tells_all(
    command: Start, address: BrokerAddress
) -> None:
    run_id = submit(command, CLAIMS, "--limit", "20")
    worker = command("worker")
    batches = [decode(VerdictBatch, delivery.body) for delivery in take(address, "verdicts", 2)]
    verdicts = [verdict for batch in batches for verdict in batch.verdicts]
    lines = sample_lines()[:20]
    by_id = {verdict.claim_id: verdict for verdict in verdicts}
    assert sorted(by_id) == sorted(line["id"] for line in lines)
    for position, line in enumerate(lines):
        verdict = by_id[line["id"]]
        assert (verdict.position, verdict.text, verdict.gold) == (
            position,
            line["claim"],
            line["label"],
        )
        assert verdict.label in batches[0].labels
        assert sum(verdict.probabilities) == pytest.approx(1, abs=1e-5)
        assert (
            max(verdict.probabilities)
            == verdict.probabilities[batches[0].labels.index(verdict.label)]
        )
        assert verdict.raw_text.startswith("word") and verdict.prompt_tokens > 10
    assert {batch.run_id for batch in batches} == {run_id}
    assert batches[0].attempt == 1 and batches[0].worker_id and batches[0].device
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.output


def states(environment: dict[str, str]) -> list[str]:
    return [record.state for record in warm_here(environment)]


def test_the_engines_socket_and_log_are_closed_to_other_users(
    command: Start, environment: dict[str, str]
) -> None:
    worker = command("worker")
    worker.said("worker.taking")
    runtime = Path(environment["KEEPWARM_RUNTIME_DIR"])
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    files = list(runtime.iterdir())
    # Of the engine, its fork server and its keeper.
    assert len(list(runtime.glob("*.sock"))) == len(list(runtime.glob("*.log"))) == 3
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    # Directories are for temporary files of the engine and its fork server.
    assert modes == {path.name: 0o700 if path.is_dir() else 0o600 for path in files}


def test_the_engine_gets_none_of_our_secrets(command: Start, node: PrivateNode) -> None:
    worker = command("worker")
    worker.said("worker.taking")
    for process in worker.descendants():
        assert node.password not in json.dumps(process.environ())
        assert node.password not in " ".join(process.cmdline())


def test_sigterm_drains_and_another_worker_completes_the_run(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    run_id = submit(command)
    collecting = collect(command, run_id)
    worker = command("worker", **SLOWLY)
    wait_for_the_first_verdicts(collecting, environment)
    (before,) = warm_here(environment)
    with held(environment):
        worker.signal(signal.SIGTERM)
        worker.said("worker.draining")
    assert worker.wait() == 0, worker.output
    assert 0 < len(outcomes(environment)) < 240
    hurry(environment)
    other = command("worker", **SLOWLY)  # as the first, so that it has the same engine
    other.said("worker.taking")
    assert collecting.wait() == 0
    (after,) = warm_here(environment)
    assert (after.pid, after.used) == (before.pid, 2)  # the context outlives its worker
    assert_complete(environment, run_id)
    other.signal(signal.SIGTERM)
    assert other.wait() == 0


def test_a_second_sigterm_ends_at_once(command: Start) -> None:
    submit(command)
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="60", KEEPWARM_GRACE_SECONDS="100")
    worker.said("worker.taking")
    worker.signal(signal.SIGTERM)
    worker.said("worker.draining")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 128 + signal.SIGTERM


def test_what_cannot_be_finished_in_the_grace_period_is_returned(
    command: Start, node: PrivateNode, address: BrokerAddress
) -> None:
    run_id = submit(command)
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="60", KEEPWARM_GRACE_SECONDS="3")
    worker.said("worker.taking")
    queue = context_of(worker)
    wait_for_messages(node, topology.claims_queue(queue), 12, "three taken")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.output
    wait_for_messages(node, topology.claims_queue(queue), 15, "all given back")
    # Only what the worker says of its start.
    assert run_id and messages_in(node, topology.VERDICTS_QUEUE) == 1


def test_sigkill_loses_nothing_doubles_nothing_and_leaves_the_engine_to_the_heir(
    command: Start, environment: dict[str, str]
) -> None:
    run_id = submit(command)
    collecting = collect(command, run_id)
    worker = command("worker", **SLOWLY)
    wait_for_the_first_verdicts(collecting, environment)
    (before,) = warm_here(environment)
    os.killpg(worker.process.pid, signal.SIGKILL)
    worker.wait()
    hurry(environment)
    other = command("worker", **SLOWLY)
    other.said("worker.taking")
    assert collecting.wait() == 0
    (after,) = warm_here(environment)
    assert after.pid == before.pid
    assert_complete(environment, run_id)
    other.signal(signal.SIGTERM)
    assert other.wait() == 0


def test_an_engine_that_is_killed_is_started_again_by_its_keeper(
    command: Start, environment: dict[str, str]
) -> None:
    worker = command("worker")
    worker.said("worker.taking")
    (before,) = warm_here(environment)
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    worker.said("engine.ready", times=2)  # the worker lives, and asks for another
    (after,) = warm_here(environment)
    assert after.pid != before.pid


def test_an_engine_that_crashes_is_started_again_and_its_batch_answered(
    command: Start, environment: dict[str, str]
) -> None:
    run_id = submit(command)
    collecting = collect(command, run_id)
    worker = command("worker", VLLM_TEST_FAULT="crash-once")
    assert collecting.wait() == 0
    assert_complete(environment, run_id)
    worker.said("engine.died")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_an_engine_that_cannot_start_is_explained_with_its_last_words(
    command: Start, environment: dict[str, str]
) -> None:
    worker = command("worker", VLLM_TEST_FAULT="no-start")
    assert worker.wait() == 4
    assert "RuntimeError: out of memory, says the test engine" in worker.output
    log = next(Path(environment["KEEPWARM_RUNTIME_DIR"]).glob("ctx-*.log"))
    assert str(log) in worker.output


def test_an_engine_that_is_silent_for_too_long_is_given_up_on(command: Start) -> None:
    worker = command(
        "worker", VLLM_TEST_START_SECONDS="600", KEEPWARM_ENGINE_START_TIMEOUT_SECONDS="10"
    )
    assert worker.wait() == 4
    assert "did not answer within 10 s" in worker.output


def test_a_worker_can_be_stopped_while_its_engine_starts(
    command: Start, environment: dict[str, str]
) -> None:
    worker = command("worker", VLLM_TEST_START_SECONDS="600")
    wait_until(lambda: states(environment) == ["starting"], "a start")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    # Nobody waits for it any more.
    wait_until(lambda: not warm_here(environment), "the engine gone")


def claims_of(deliveries: list[Delivery]) -> list[str]:
    return [claim.claim_id for d in deliveries for claim in d.message(ClaimBatch).claims]


def test_an_engine_that_aborts_whatever_it_is_asked_is_given_up_on_and_its_claims_returned(
    command: Start, node: PrivateNode, address: BrokerAddress
) -> None:
    submit(command)
    twice = {"KEEPWARM_ENGINE_START_ATTEMPTS": "2", "KEEPWARM_GRACE_SECONDS": "60"}
    worker = command("worker", VLLM_TEST_FAULT="abort", **twice)
    assert worker.wait() == 4
    assert "it gave no usable answer: aborted" in worker.output
    # Only what the worker says of its starts; it may end before it says so of the second. Of claims
    # there is nothing: all of them are still waiting.
    assert 1 <= messages_in(node, topology.VERDICTS_QUEUE) <= 2
    assert messages_in(node, topology.DEAD_CLAIMS_QUEUE) == 0
    context = topology.claims_queue(context_of(worker))

    def returned_and_left() -> tuple[int, int] | None:
        found = messages_in(node, topology.RETURNS_QUEUE), messages_in(node, context)
        return found if sum(found) == 15 else None

    returned, left = wait_until(returned_and_left, "all given back")
    assert 1 <= returned <= 3
    waiting = take(address, topology.RETURNS_QUEUE, returned) + take(address, context, left)
    assert sorted(claims_of(waiting)) == [line["id"] for line in sample_lines()]


def test_claims_whose_scores_are_missing_are_asked_again_alone(
    command: Start, address: BrokerAddress
) -> None:
    submit(command, CLAIMS, "--limit", "3")
    command("worker", VLLM_TEST_FAULT="unscored")
    (delivery,) = take(address, topology.VERDICTS_QUEUE, 1)
    verdicts = delivery.message(VerdictBatch).verdicts
    assert len(verdicts) == 3 and all(verdict.probabilities for verdict in verdicts)


@pytest.mark.parametrize("fault", ["crash-long", "nan-long"])
def test_a_claim_that_the_engine_fails_with_each_time_is_set_aside_with_the_evidence(
    command: Start, environment: dict[str, str], tmp_path: Path, fault: str
) -> None:
    file = tmp_path / "claims.jsonl"
    lines = [{"id": str(number), "claim": f"Claim {number}."} for number in range(48)]
    lines[11]["evidence"] = "many different words " * 60
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    collecting = collect(command, submit(command, str(file)))
    worker = command("worker", VLLM_TEST_FAULT=fault)
    assert collecting.wait() == 0, worker.output
    by_id = {claim_id: (label, reason) for claim_id, label, reason in outcomes(environment)}
    assert by_id.pop("11") == (None, "engine-failed")
    assert len(by_id) == 47 and all(label for label, _ in by_id.values())
    starts = worker.output.count("engine.ready")
    # It fails among others, with its batch, and twice alone.
    assert starts == (5 if fault == "crash-long" else 1)
    shown = command("dead", "show", *dead_of(environment))
    assert shown.wait() == 0, shown.output
    assert "3 times with this claim, 2 of them alone" in shown.output
    assert ("Segmentation fault, says the test engine" in shown.output) == (fault == "crash-long")


def test_an_engine_that_hangs_is_started_again_and_its_claims_answered(
    command: Start, environment: dict[str, str]
) -> None:
    run_id = submit(command)
    collecting = collect(command, run_id)
    worker = command(
        "worker", VLLM_TEST_FAULT="hang-once", KEEPWARM_ENGINE_REQUEST_TIMEOUT_SECONDS="5"
    )
    assert collecting.wait() == 0
    assert_complete(environment, run_id)
    worker.said("engine.silent")
    worker.said("engine.ready", times=2)


def test_a_claim_that_the_engine_refuses_is_found_and_harms_no_other(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "claims.jsonl"
    lines = [{"id": str(number), "claim": f"Claim {number}."} for number in range(16)]
    lines[11]["evidence"] = "many different words " * 60
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    collecting = collect(command, submit(command, str(file)))
    # There is no other engine that might take it.
    command("worker", VLLM_TEST_FAULT="refuse-long", KEEPWARM_OTHER_ENGINE_SECONDS="5")
    assert collecting.wait() == 0, collecting.output
    by_id = {claim_id: (label, reason) for claim_id, label, reason in outcomes(environment)}
    assert by_id.pop("11") == (None, "engine-refused")
    assert len(by_id) == 15 and all(label for label, _ in by_id.values())
    shown = command("dead", "show", *dead_of(environment))
    assert shown.wait() == 0, shown.output
    assert "a prompt is too long" in shown.output
    assert "No other engine answered the claim" in " ".join(shown.output.split())


def test_a_claim_that_is_too_long_for_the_context_dies_with_the_reason(
    command: Start, address: BrokerAddress, tmp_path: Path
) -> None:
    file = tmp_path / "claims.jsonl"
    lines = [{"claim": "Short."}, {"claim": "Long.", "evidence": "words and words " * 2_000}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    submit(command, str(file))
    command("worker")
    (dead,) = take(address, topology.DEAD_CLAIMS_QUEUE, 1)
    claim = decode(DeadClaim, dead.body)
    assert (claim.claim.text, claim.reason) == ("Long.", "too-long")
    assert "--max-model-tokens" in claim.detail
    assert len(take(address, topology.VERDICTS_QUEUE, 1)) == 1


def test_a_message_that_is_not_ours_goes_to_the_dead_messages(
    command: Start, node: PrivateNode, broker
) -> None:
    worker = command("worker")
    worker.said("worker.taking")
    queue = topology.claims_queue(context_of(worker))
    send(node, topology.CLAIMS_EXCHANGE, queue, b'{"schema_version": 1}')
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 1, "a dead message")
    worker.said("batch.refused")
    assert worker.process.poll() is None


def test_a_worker_outlives_the_end_of_its_connections(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    run_id = submit(command)
    worker = command("worker", **SLOWLY)
    worker.said("worker.taking")
    for connection in psutil.Process(worker.process.pid).net_connections(kind="tcp"):
        os.system(
            f"ss -K dst 127.0.0.1 dport = {node.port} sport = {connection.laddr.port} >/dev/null"
        )
    collecting = collect(command, run_id)
    assert collecting.wait() == 0
    assert_complete(environment, run_id)
