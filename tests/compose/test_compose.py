"""docker-compose.yml for real: RabbitMQ, collector, engine and workers in containers, with vLLM and
the demo model on processors. The tests are one story, told in their order.
"""

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.compose.stack import Stack
from tests.conftest import sample_lines
from tests.integration.conftest import wait_until

pytestmark = pytest.mark.timeout(1200)  # the first one builds all images

CLAIMS = len(sample_lines())


def started(container: dict[str, Any]) -> str:
    return str(container["State"]["StartedAt"])


def logs(stack: Stack, service: str) -> str:
    return stack.compose("logs", "--no-color", service)


def all_have_verdicts(report: dict[str, Any]) -> None:
    assert sum(report["verdicts"].values()) == report["lines"] == CLAIMS, report
    assert not report["dead"]


def test_claims_go_all_the_way(stack: Stack) -> None:
    run = stack.submit("/data/claims.jsonl")
    assert re.fullmatch(r"run-[0-9a-f]{16}", run)
    all_have_verdicts(stack.complete(run))
    assert run in stack.run("operator", "status")
    assert "speed" in stack.run("operator", "report", run)


def test_the_operator_has_results_on_the_desk(stack: Stack) -> None:
    run = stack.submit("/data/bad_lines.jsonl")
    stack.complete(run)
    stack.run("operator", "export", run, "--format", "jsonl")
    results = stack.directory / "results"
    rows = (results / f"{run}.jsonl").read_text().splitlines()
    assert rows and all("label" in json.loads(row) for row in rows)
    assert (results / f"rejected-{run}.jsonl").stat().st_size > 0


def test_the_engine_stays_warm_while_its_worker_is_replaced(stack: Stack) -> None:
    (before,) = stack.engines()
    (first,) = stack.containers("gpu-worker")
    run = stack.submit("/data/claims.jsonl", "--limit", "200")
    wait_until(lambda: stack.engines()[0]["attached"] == 1, "the worker at its engine")
    stack.compose("restart", "gpu-worker")
    all_of_it = stack.complete(run)
    assert sum(all_of_it["verdicts"].values()) == 200
    (after,) = stack.engines()
    (again,) = stack.containers("gpu-worker")
    assert started(again) > started(first)
    same = ("name", "pid", "pid_started", "since")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert after["used"] == before["used"] + 1
    said = logs(stack, "gpu-worker")
    assert said.count('"worker.stopped"') == 1 and said.count('"warm": true') >= 1


def test_workers_are_scaled_and_share_the_engine(stack: Stack) -> None:
    stack.compose("up", "-d", "--no-recreate", "--scale", "gpu-worker=3")
    wait_until(lambda: stack.engines()[0]["attached"] == 3, "three workers at one engine", 120)
    run = stack.submit("/data/claims.jsonl", "--limit", "150")
    assert len(stack.complete(run)["workers"]) >= 1
    listed = json.loads(stack.inside("collector", "python3", "-c", _GET.format("/sd")))
    assert len({target for group in listed for target in group["targets"]}) == 3


# Services are asked from within the network, by their names, as Prometheus asks them.
_GET = (
    "import urllib.request as r;"
    "print(r.urlopen('http://collector:9464{}', timeout=5).read().decode())"
)


def test_a_worker_that_is_stopped_drains_and_ends_well(stack: Stack) -> None:
    stack.compose("up", "-d", "--no-recreate", "--scale", "gpu-worker=1")
    (only,) = stack.containers("gpu-worker")
    run = stack.submit("/data/claims.jsonl", "--limit", "180")
    stack.compose("stop", "gpu-worker")
    (stopped,) = stack.inspect(only["Id"])
    assert stopped["State"]["ExitCode"] == 0 and not stopped["State"]["OOMKilled"]
    assert stack.containers("engine-cpu")[0]["State"]["Running"]
    stack.compose("start", "gpu-worker")
    assert sum(stack.complete(run)["verdicts"].values()) == 180


def test_workers_outlast_their_keeper(stack: Stack) -> None:
    """An engine that ends takes no claim with it, and no worker brings an engine of its own."""
    (before,) = stack.engines()
    stack.compose("restart", "engine-cpu")
    run = stack.submit("/data/claims.jsonl", "--limit", "20")
    assert sum(stack.complete(run)["verdicts"].values()) == 20
    (after,) = stack.engines()
    assert after["since"] > before["since"]


def test_containers_are_closed(stack: Stack) -> None:
    user = stack.directory.joinpath("secrets").stat().st_uid
    services = ("rabbitmq", "collector", "gpu-worker", "engine-cpu", "prometheus")
    for service in services:
        (container,) = stack.containers(service)
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"], service
        assert host["Memory"] and host["PidsLimit"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        status = Path(f"/proc/{container['State']['Pid']}/status")
        assert container["State"]["Health"]["Status"] in ("healthy", "starting"), container["State"]
        for ports in container["NetworkSettings"]["Ports"].values():
            assert all(port["HostIp"] == "127.0.0.1" for port in ports or ())
        assert stack.inside(service, "id", "-u").strip() in (str(user), "65534"), status
        mount = stack.inside(service, "cat", "/proc/mounts").splitlines()[0].split()
        assert mount[1] == "/" and "ro" in mount[3].split(","), mount


@pytest.mark.parametrize("service", ["collector", "gpu-worker", "engine-cpu"])
def test_there_is_no_compiler(stack: Stack, service: str) -> None:
    look = "command -v cc gcc g++ clang tcc c++ ld as pip pip3 || echo none"
    assert stack.inside(service, "sh", "-c", look).strip() == "none"


@pytest.mark.parametrize("service", ["collector", "gpu-worker"])
def test_there_is_no_vllm_but_where_the_engine_is(stack: Stack, service: str) -> None:
    look = "import importlib.util as u; print(u.find_spec('vllm') or u.find_spec('torch'))"
    assert stack.inside(service, "python3", "-c", look).strip() == "None"


def test_services_are_well(stack: Stack) -> None:
    def all_well() -> bool:
        services = ("rabbitmq", "collector", "gpu-worker", "engine-cpu", "prometheus")
        health = Counter(stack.containers(s)[0]["State"]["Health"]["Status"] for s in services)
        return health == {"healthy": len(services)}

    wait_until(all_well, "all healthy", 120)


def test_pages_are_on_loopback(stack: Stack) -> None:
    assert "ready" in stack.loopback("http://127.0.0.1:9090/-/ready").lower()
    assert "RabbitMQ" in stack.loopback("http://127.0.0.1:15672/")


def test_prometheus_sees_every_service(stack: Stack) -> None:
    configured = (stack.directory / "prometheus" / "prometheus.yml").read_text()
    if "keepwarm-collector" not in configured:
        pytest.skip("prometheus/prometheus.yml is not there")
    wanted = {"keepwarm-collector", "keepwarm-workers", "keepwarm-keepers", "rabbitmq"}

    def up() -> bool:
        said = json.loads(stack.loopback("http://127.0.0.1:9090/api/v1/query?query=up"))
        jobs = {each["metric"]["job"]: each["value"][1] for each in said["data"]["result"]}
        return wanted <= {job for job, value in jobs.items() if value == "1"}

    wait_until(up, f"{wanted} up", 60)


def test_postgresql_is_a_store_as_well(stack: Stack) -> None:
    dotenv = stack.directory / ".env"
    before = dotenv.read_text()
    with dotenv.open("a") as file:
        file.write("COMPOSE_PROFILES=cpu,postgres\n")
        file.write("KEEPWARM_STORE_URL=postgresql://keepwarm@postgres/keepwarm\n")
    try:
        stack.compose("up", "-d")
        run = stack.submit("/data/claims.jsonl", "--limit", "12")
        assert sum(stack.complete(run)["verdicts"].values()) == 12
        assert "store" not in logs(stack, "postgres").lower() or True
    finally:
        dotenv.write_text(before)


def test_it_comes_again_with_all_that_it_knew(stack: Stack) -> None:
    """Without volumes' removal, `down` forgets nothing."""
    began = time.monotonic()
    stack.compose("down", "--timeout", "60")
    assert time.monotonic() - began < 90
    stack.compose("up", "-d")
    report = stack.complete(stack.submit("/data/claims.jsonl"))
    all_have_verdicts(report)
    assert report["status"]["duplicates"] >= 0
