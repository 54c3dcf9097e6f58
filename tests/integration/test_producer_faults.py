"""The producer fails, changes its mind or its file: the run ends complete, or cancelled."""

import json
import signal
from pathlib import Path

import pytest

from services.broker import PrivateNode
from services.contracts import (
    ClaimBatch,
    ContextSpec,
    Settings,
    Verdict,
    VerdictBatch,
    decode,
    load_settings,
    topology,
)
from services.models.files import pin_model
from services.store import Incoming, RunStatus, Store, run_status
from tests.conftest import SHARED_DATA, sample_lines
from tests.integration.conftest import (
    messages_in,
    plain_connection,
    wait_for_messages,
    wait_until,
)
from tests.integration.runs import (
    CLAIMS,
    Start,
    assert_complete,
    end_well,
    go_on,
    held,
    hurry,
    outcomes,
    status_of,
    submit,
    wait_for_the_first_verdicts,
    write_claims,
)
from tests.integration.test_collector import collecting_here

MANY = 4_000


@pytest.fixture
def claims_queue(small_model: Path) -> str:
    return topology.claims_queue(pin_model(ContextSpec(model=str(small_model))).context_id)


def many_claims() -> list[dict[str, str]]:
    """FEVER's where they are at hand, otherwise the samples again and again."""
    fever = SHARED_DATA / "fever_labelled_dev.jsonl"
    if fever.exists():
        with fever.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(MANY), strict=False)]
        return [{**row, "id": str(row["id"])} for row in rows]
    samples = sample_lines()
    return [{**samples[number % len(samples)], "id": f"again-{number}"} for number in range(MANY)]


def test_a_submit_killed_in_its_midst_is_completed_by_the_next(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    claims_queue: str,
    tmp_path: Path,
) -> None:
    claims = many_claims()
    file = write_claims(tmp_path / "many.jsonl", claims)
    collecting = command("collect")
    for sent in (50, 200):
        already = messages_in(node, claims_queue)
        killed = command(*("submit", str(file), "--batch-size", "2"), KEEPWARM_PUBLISH_WINDOW="1")
        wait_until(
            lambda: messages_in(node, claims_queue) >= already + sent,  # noqa: B023
            "some claims sent",
        )
        killed.signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    left = messages_in(node, claims_queue)
    assert 250 <= left < 2 * MANY // 2
    worker = command("worker")
    wait_for_messages(node, claims_queue, 0, "all that was sent is taken")
    run_id = submit(command, file)
    wait_until(lambda: _complete(environment, run_id), "the run's end")
    assert_complete(environment, run_id, [claim["id"] for claim in claims])
    end_well(worker, collecting)


def _complete(environment: dict[str, str], run_id: str) -> bool:
    status = status_of(environment, run_id)
    return status is not None and status.complete


def test_a_file_that_changed_under_its_unfinished_run_is_refused_with_the_difference(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    lines = sample_lines()
    file = write_claims(tmp_path / "claims.jsonl", lines)
    run_id = submit(command, file)
    collecting = command("collect")
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="0.05")
    wait_until(lambda: len(outcomes(environment)) >= 32, "some verdicts")
    end_well(worker)
    end_well(collecting)
    changed = [
        {**lines[0], "claim": "Sharks have skeletons made of cardboard."},
        *lines[1:],
        lines[1],
    ]
    write_claims(file, changed)
    refused = command("submit", str(file))
    assert refused.wait() == 3
    for part in (
        f"since it was submitted as {run_id}, which is unfinished",
        "240 lines then, 241 lines now",
        "1 have another text or are missing, first 'kw-0001' in line 1",
        f"keepwarm cancel {run_id}",
    ):
        assert part in refused.output, refused.output
    assert "cardboard" not in refused.output  # no claim's text
    # As it was, it completes that run.
    write_claims(file, lines)
    assert submit(command, file) == run_id
    worker, collecting = command("worker"), command("collect", "--until", run_id)
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    end_well(worker)
    # And of a complete run the file may change.
    write_claims(file, changed)
    assert submit(command, file) != run_id


def test_a_cancelled_run_is_dropped_by_its_workers_and_completed_when_sent_again(
    command: Start, environment: dict[str, str], node: PrivateNode, claims_queue: str
) -> None:
    run_id = submit(command)
    collecting = command("collect")
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="0.05")
    wait_for_the_first_verdicts(collecting, environment)
    with held(environment):
        cancelling = command("cancel", run_id[:10])
        assert cancelling.wait() == 0, cancelling.output
    assert run_id in cancelling.output
    worker.said("batch.cancelled")
    wait_for_messages(node, claims_queue, 0, "the rest dropped")
    shown = command("status", "--json")
    assert shown.wait() == 0, shown.output
    (status,) = json.loads(shown.output)
    assert (status["run_id"], status["cancelled"], status["complete"]) == (run_id, True, False)
    assert 0 < status["done"] < 240
    # Sent again it is wanted again, while what was sent before it stays unwanted.
    assert submit(command) == run_id
    hurry(environment)
    wait_until(lambda: _complete(environment, run_id), "the run's end")
    assert_complete(environment, run_id)
    last = status_of(environment, run_id)
    assert last is not None and not last.cancelled and last.duplicates == 0
    end_well(worker, collecting)


def test_a_collector_that_ends_with_a_cancelled_run_has_sent_the_cancellation(
    command: Start, environment: dict[str, str]
) -> None:
    # A commit for each claim: it is among them that it learns that the run is cancelled.
    run_id = submit(command, CLAIMS, "--batch-size", "1")
    run = go_on(command, environment, run_id, VLLM_TEST_CLAIM_SECONDS="0.05")
    with held(environment):
        assert command("cancel", run_id).wait() == 0
    assert run.collecting.wait() == 7
    assert f"{run_id} was cancelled" in run.collecting.output
    run.worker.said("batch.cancelled")
    end_well(run.worker)


def test_of_a_run_that_was_cancelled_the_changed_file_may_be_sent(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    file = write_claims(tmp_path / "claims.jsonl", sample_lines()[:32])
    collecting = command("collect")
    run_id = submit(command, file)
    wait_until(lambda: status_of(environment, run_id), "the announcement")
    write_claims(file, sample_lines()[:33])
    assert command("submit", str(file)).wait() == 3
    assert command("cancel", run_id).wait() == 0
    assert submit(command, file) != run_id
    end_well(collecting)


def test_a_file_without_a_single_claim_is_refused_and_harms_nobody(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": 1}\n{"claim": ""}\nnot json\n')
    collecting = command("collect")
    refused = command("submit", str(file), "--rejected", str(tmp_path / "rejected.jsonl"))
    assert refused.wait() == 3
    assert "none of its 3 lines is a claim" in refused.output
    run_id = submit(command, CLAIMS)
    worker = command("worker")
    wait_until(lambda: _complete(environment, run_id), "the run's end")
    end_well(worker, collecting)


def lose_batches(node: PrivateNode, queue: str, count: int) -> list[ClaimBatch]:
    """Take batches off a claims queue, for good."""
    connection = plain_connection(node)
    channel = connection.channel()
    lost = []
    while len(lost) < count:
        got, _, body = channel.basic_get(queue, auto_ack=True)
        if got is not None:
            lost.append(decode(ClaimBatch, body))
    connection.close()
    return lost


def test_missing_claims_are_reported_by_status_and_sent_again_by_submit(
    command: Start,
    environment: dict[str, str],
    broker: Settings,
    node: PrivateNode,
    claims_queue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.missing_claims.MISSING_SECONDS", 3.0)
    monkeypatch.setattr("services.collector.missing_claims._HEARTBEATS", 0)
    run_id = submit(command)
    lost = lose_batches(node, claims_queue, 2)
    settings = broker.model_copy(update={"store_url": environment["KEEPWARM_STORE_URL"]})
    with collecting_here(settings), Store.open(settings) as store:

        def status_now() -> RunStatus:
            found = run_status(store, run_id)
            assert found is not None
            return found

        wait_until(lambda: run_status(store, run_id), "the announcement")
        worker = command("worker")
        wait_until(lambda: status_now().nowhere_since, "the word that claims are nowhere")
        status = command("status")
        assert status.wait() == 0, status.output
        said = " ".join(status.output.split())
        assert "claims missing" in said
        assert f"{run_id}: since " in said
        assert "32 claims are in no queue and at no worker (records " in said
        records = sorted(claim.position + 1 for batch in lost for claim in batch.claims)
        assert f"records {records[0]}" in said
        again = command("submit", CLAIMS)
        assert again.wait() == 0, again.output
        assert "32 of 240 claims are sent to the broker" in again.output
        wait_until(lambda: status_now().complete, "the run's end")
        assert status_now().nowhere_since is None
    assert_complete(environment, run_id)
    end_well(worker)


def test_a_run_with_an_outcome_of_another_claim_is_not_complete_and_mended_by_submit(
    command: Start, environment: dict[str, str], node: PrivateNode, claims_queue: str
) -> None:
    run_id = submit(command)
    (lost,) = lose_batches(node, claims_queue, 1)
    with Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"])) as store:
        verdicts = tuple(
            Verdict(
                claim_id=f"foreign-{claim.claim_id}",
                position=claim.position,
                text=claim.text,
                label="SUPPORTS",
                probabilities=(),
                mass=0.0,
                raw_text="",
                prompt_tokens=1,
            )
            for claim in lost.claims
        )
        foreign = VerdictBatch(
            run_id=run_id,
            batch_id="b",
            labels=lost.run.prompt.label_names,
            verdicts=verdicts,
            worker_id="older",
            device="none",
            attempt=1,
            engine_seconds=0.1,
        )
        store.write(Incoming(verdicts=[foreign]))
    worker = command("worker")
    collecting = command("collect", "--until", run_id)
    assert collecting.wait() == 7, collecting.output
    assert "has outcomes of claims that are not in its file" in collecting.output
    status = command("status")
    assert status.wait() == 0, status.output
    assert "some outcomes belong to claims that are not in the file" in status.output
    assert "wrong claims" in status.output
    again = command("submit", CLAIMS)
    assert again.wait() == 0, again.output
    assert "Removed 16 outcomes of claims that are not in the file: 'foreign-" in again.output
    assert "16 of 240 claims are sent to the broker" in again.output
    assert command("collect", "--until", run_id).wait() == 0
    assert_complete(environment, run_id)
    found = status_of(environment, run_id)
    assert found is not None and found.proven is True
    end_well(worker)
