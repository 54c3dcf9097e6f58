"""What services tell over HTTP, against what the store has."""

import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.broker import PrivateNode
from tests.conftest import sample_lines
from tests.integration.conftest import Command, commands, wait_until
from tests.integration.runs import SLOWLY, Start, begin, end_well, held, outcomes, status_of, submit


def address_of(service: Command) -> str:
    """Where it said that it serves its metrics."""
    service.said("metrics.serving")
    (told,) = (line for line in service.lines if "metrics.serving" in line)
    return str(json.loads(told)["address"])


def get(service: Command, path: str) -> httpx.Response:
    return httpx.get(f"http://{address_of(service)}{path}", timeout=30)


def samples(service: Command) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What it tells now, by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(get(service, "/metrics").text):
        for sample in family.samples:
            found[sample.name].append((dict(sample.labels), sample.value))
    return found


def total(told: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    return sum(v for own, v in told[name] if labels.items() <= own.items())


def preemptions(collecting: Command) -> dict[str, float]:
    """By kind, those that there were."""
    told = samples(collecting)["keepwarm_preemptions_total"]
    return {own["kind"]: value for own, value in told if value}


def discovered(collecting: Command) -> dict[str, dict[str, str]]:
    """Labels by address."""
    return {each["targets"][0]: each["labels"] for each in get(collecting, "/sd").json()}


def is_ready(service: Command) -> bool:
    return get(service, "/readyz").status_code == 200


def test_after_a_run_the_metrics_agree_with_the_store(
    command: Start, environment: dict[str, str]
) -> None:
    collecting, worker = command("collect"), command("worker")
    run_id = submit(command)
    ids = {row["id"] for row in sample_lines()}
    wait_until(lambda: len(outcomes(environment)) == len(ids), "an outcome for every claim")
    labels = Counter(label for _, label, _ in outcomes(environment))

    def told_of_all() -> dict | None:
        """The engine's are among them, and the last verdict, which is counted once confirmed."""
        looked = samples(worker)
        counted = {own["label"]: value for own, value in looked["keepwarm_verdicts_total"]}
        return looked if total(looked, "keepwarm_engine_metrics_up") and counted == labels else None

    told = wait_until(told_of_all, f"its metrics, and its engine's, with {labels}")
    assert total(told, "keepwarm_claims_dead_total") == 0
    assert total(told, "keepwarm_contexts", state="warm") == 1
    assert total(told, "keepwarm_broker_connected") == 2
    assert total(told, "keepwarm_context_attaches_total") == 1
    batches = total(told, "keepwarm_batch_seconds_count", phase="inferring")
    assert batches == total(told, "keepwarm_batch_seconds_count", phase="waiting") >= 240 / 16
    assert total(told, "keepwarm_device_seconds_total", use="inferring") > 0
    assert total(told, "keepwarm_device_seconds_total", use="loading") > 0
    # The engine's own, and nothing of it that has the name of something of ours.
    assert total(told, "vllm:prompt_tokens_total") > 0
    assert len(told["process_open_fds"]) == 1

    # Counted after the commit, and at most some seconds old.
    wait_until(lambda: total(samples(collecting), "keepwarm_run_complete"), "a complete run")
    told = samples(collecting)
    status = status_of(environment, run_id)
    assert status is not None
    assert total(told, "keepwarm_store_verdicts_total") == status.done + status.duplicates
    assert total(told, "keepwarm_store_duplicate_verdicts_total") == status.duplicates
    assert total(told, "keepwarm_store_returned_claims_total") == status.returned
    by_name = {
        "keepwarm_run_claims": status.total,
        "keepwarm_run_done_claims": status.done,
        "keepwarm_run_dead_claims": status.dead,
        "keepwarm_run_rejected_lines": status.rejected,
        "keepwarm_run_lost_claims": status.lost_work,
    }
    assert {name: total(told, name, run_id=run_id) for name in by_name} == by_name
    by_label = {own["label"]: value for own, value in told["keepwarm_run_verdicts"] if value}
    assert by_label == labels and Counter(status.verdicts) == labels
    judged = {own["correct"]: value for own, value in told["keepwarm_run_gold_verdicts"]}
    assert judged == {"true": status.correct, "false": len(ids) - status.correct}
    (info,) = (own for own, _ in told["keepwarm_run_info"])
    assert (info["run_id"], info["context_id"]) == (run_id, status.context_id)
    assert total(told, "keepwarm_cold_start_seconds_count", phase="total") == 1
    # A run may be over before the collector has the first heartbeat: those come every 5 s.
    wait_until(
        lambda: total(samples(collecting), "keepwarm_workers", state="serving") == 1, "a heartbeat"
    )
    wait_until(
        lambda: total(samples(collecting), "keepwarm_context_workers") == 1, "a warm context"
    )
    end_well(worker, collecting)


def test_workers_are_found_on_ports_of_their_own_and_gone_when_they_drain(
    command: Start, environment: dict[str, str]
) -> None:
    collecting = command("collect")
    collecting.said("broker.connected")
    workers = [command("worker", SLURM_JOB_ID=str(70 + n)) for n in range(2)]
    addresses = {address_of(worker): worker for worker in workers}
    assert len(addresses) == 2
    wait_until(lambda: discovered(collecting).keys() == addresses.keys(), "both in /sd")
    found = discovered(collecting)
    for address, worker in addresses.items():
        assert found[address]["service"] == "worker"
        assert found[address]["__meta_keepwarm_worker"].split("-")[-2] == str(worker.process.pid)
        assert found[address]["__meta_keepwarm_job_id"] == str(70 + workers.index(worker))
    wait_until(lambda: is_ready(workers[0]), "a worker that is ready")
    (left,) = (address for address, worker in addresses.items() if worker is workers[1])
    end_well(workers[0])
    # At once: its last report says so.
    wait_until(lambda: discovered(collecting).keys() == {left}, "one of them", 15)
    assert preemptions(collecting) == {"SIGTERM": 1}
    end_well(workers[1], collecting)


def test_a_worker_that_is_killed_is_gone_within_half_a_minute(
    command: Start, environment: dict[str, str]
) -> None:
    under_way = begin(command, environment)
    collecting = under_way.collecting
    address = address_of(under_way.worker)
    with held(environment):
        wait_until(lambda: address in discovered(collecting), "the worker in /sd")
        os.killpg(under_way.worker.process.pid, signal.SIGKILL)
    wait_until(lambda: not discovered(collecting), "nobody in /sd", 30)
    assert preemptions(collecting) == {"vanished": 1}
    assert total(samples(collecting), "keepwarm_workers") == 0
    end_well(collecting)


@pytest.fixture
def own_node(tmp_path: Path) -> Iterator[PrivateNode]:
    """A node that may be stopped."""
    with PrivateNode(tmp_path / "own-node") as node:
        yield node


def test_nobody_is_ready_without_a_broker_and_everybody_is_again_with_it(
    own_node: PrivateNode, environment: dict[str, str]
) -> None:
    variables = {
        **environment,
        "KEEPWARM_BROKER_URL": own_node.url,
        "KEEPWARM_BROKER_PASSWORD": own_node.password,
        **SLOWLY,
    }
    with commands(variables) as command:
        collecting = command("collect")
        collecting.said("broker.connected")
        submit(command)
        worker = command("worker")
        services = (collecting, worker)
        wait_until(lambda: all(map(is_ready, services)), "both ready")
        own_node.stop()
        wait_until(lambda: not any(map(is_ready, services)), "neither ready")
        for service in services:
            assert get(service, "/readyz").text.startswith("no connection to the broker")
            assert get(service, "/healthz").status_code == 200
            wait_until(
                lambda: total(samples(service), "keepwarm_broker_connected") == 0,  # noqa: B023
                "no connection of either link",
            )
        own_node.start()
        wait_until(lambda: all(map(is_ready, services)), "both ready again")
        for service in services:
            assert total(samples(service), "keepwarm_broker_reconnects_total") >= 2
        # That nobody could be heard is nobody's fault.
        assert not preemptions(collecting)
        end_well(worker, collecting)


def test_status_shows_who_works_on_what_while_it_lasts(
    command: Start, environment: dict[str, str]
) -> None:
    under_way = begin(command, environment)
    watching = command("status", "--watch", "--every", "0.3", COLUMNS="240")
    watching.said(under_way.run_id)
    for heard in (f"-{under_way.worker.process.pid}-", "serving", "messages: runs 0"):
        watching.said(heard)
    end_well(under_way.worker)
    watching.said("no workers")
    watching.end()
