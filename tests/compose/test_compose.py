"""docker-compose.yml for real: RabbitMQ, collector, engine and workers in containers, with vLLM and
the demo model on processors. The tests are one story, told in their order.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.compose.daemon import Daemon
from tests.compose.stack import Stack
from tests.conftest import sample_lines
from tests.integration.conftest import wait_until

pytestmark = pytest.mark.timeout(1200)  # the first one builds all images

CLAIMS = len(sample_lines())
SERVICES = ("rabbitmq", "collector", "gpu-worker", "engine-cpu", "prometheus")


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
    assert stack.run("operator", "dead", "list") is not None


def test_claims_come_from_standard_input(stack: Stack) -> None:
    lines = (stack.directory / "samples" / "claims.jsonl").read_text().splitlines(keepends=True)
    run = stack.submit("-", standard_input="".join(lines[:5]))
    assert sum(stack.complete(run)["verdicts"].values()) == 5


def test_the_engine_stays_warm_while_its_worker_is_replaced(stack: Stack) -> None:
    (before,) = stack.engines()
    (first,) = stack.containers("gpu-worker")
    run = stack.submit("/data/claims.jsonl", "--limit", "120")
    wait_until(lambda: stack.engines()[0]["attached"] == 1, "the worker at its engine")
    stack.compose("restart", "gpu-worker")
    all_of_it = stack.complete(run)
    assert sum(all_of_it["verdicts"].values()) == 120
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
    wait_until(lambda: stack.engines()[0]["attached"] == 3, "three workers at one engine")
    run = stack.submit("/data/claims.jsonl", "--limit", "60")
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
    run = stack.submit("/data/claims.jsonl", "--limit", "100")
    stack.compose("stop", "gpu-worker")
    (stopped,) = stack.inspect(only["Id"])
    assert stopped["State"]["ExitCode"] == 0 and not stopped["State"]["OOMKilled"]
    assert stack.containers("engine-cpu")[0]["State"]["Running"]
    stack.compose("start", "gpu-worker")
    assert sum(stack.complete(run)["verdicts"].values()) == 100


def test_workers_outlast_their_keeper(stack: Stack) -> None:
    """An engine that ends takes no claim with it, and no worker brings an engine of its own."""
    (before,) = stack.engines()
    stack.compose("restart", "engine-cpu")
    run = stack.submit("/data/claims.jsonl", "--limit", "20")
    assert sum(stack.complete(run)["verdicts"].values()) == 20
    (after,) = stack.engines()
    assert after["since"] > before["since"]


def closed(container: dict[str, Any]) -> bool:
    host, user = container["HostConfig"], container["Config"]["User"]
    ports = [port for each in container["NetworkSettings"]["Ports"].values() for port in each or ()]
    return (
        host["ReadonlyRootfs"]
        and host["CapDrop"] == ["ALL"]
        and host["SecurityOpt"] == ["no-new-privileges:true"]
        and host["Memory"] > 0
        and host["PidsLimit"] > 0
        and user.split(":")[0] not in ("", "0", "root")
        and all(port["HostIp"] == "127.0.0.1" for port in ports)
    )


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_closed(stack: Stack, service: str) -> None:
    (container,) = stack.containers(service)
    assert closed(container), container
    assert stack.inside(service, "id", "-u").strip() != "0"
    said = stack.inside(service, "sh", "-c", "touch /usr/mine 2>&1; true")
    assert "Read-only file system" in said


def test_passwords_are_in_files_alone(stack: Stack) -> None:
    """Neither in variables nor on command lines, nor in what services say."""
    files = (stack.directory / "secrets").rglob("*.password")
    passwords = [file.read_text().strip() for file in files]
    shown = [json.dumps(stack.containers(service)) for service in (*SERVICES, "broker-setup")]
    said = stack.compose("logs", "--no-color")
    assert len(passwords) == 7 and not any(
        password in text for password in passwords for text in (*shown, said)
    )


def test_a_missing_password_is_named(stack: Stack) -> None:
    file = stack.directory / "secrets" / "broker" / "producer.password"
    aside = file.rename(file.with_suffix(".aside"))
    said = stack.compose("run", "--rm", "producer", "submit", "/data/claims.jsonl", check=False)
    # Compose 2 runs broker-setup first, which wants it too, and shows no logs of what ran first.
    said += stack.compose("logs", "broker-setup")
    aside.rename(file)
    assert "producer.password" in said


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
        health = {s: stack.containers(s)[0]["State"]["Health"]["Status"] for s in SERVICES}
        return set(health.values()) == {"healthy"}

    wait_until(all_well, "all healthy")


def test_pages_are_on_loopback(stack: Stack) -> None:
    assert "ready" in stack.loopback("http://127.0.0.1:9090/-/ready").lower()
    assert "RabbitMQ" in stack.loopback("http://127.0.0.1:15672/")


def test_prometheus_sees_every_service(stack: Stack) -> None:
    wanted = {"keepwarm-collector", "keepwarm-workers", "keepwarm-keepers", "rabbitmq"}

    def up() -> bool:
        said = json.loads(stack.loopback("http://127.0.0.1:9090/api/v1/query?query=up"))
        jobs = {each["metric"]["job"]: each["value"][1] for each in said["data"]["result"]}
        return wanted <= {job for job, value in jobs.items() if value == "1"}

    wait_until(up, f"{wanted} up")


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
        count = ("psql", "-U", "keepwarm", "-A", "-t", "-c", "SELECT count(*) FROM outcomes")
        assert stack.inside("postgres", *count).strip() == "12"
        assert closed(stack.containers("postgres")[0])
    finally:
        stack.compose("rm", "--stop", "--force", "postgres")
        dotenv.write_text(before)


def test_all_end_well_and_come_again_with_what_they_knew(stack: Stack) -> None:
    stack.compose("up", "-d")
    before = stack.statuses()
    stack.compose("stop")
    for service in (*SERVICES, "broker-setup"):
        for container in stack.containers(service):
            assert container["State"]["ExitCode"] == 0, (service, container["State"])
    stack.compose("down")
    stack.compose("up", "-d")
    assert stack.statuses() == before and before


def test_without_secrets_nothing_starts(daemon: Daemon, tmp_path: Path) -> None:
    said = Stack(tmp_path / "keepwarm", daemon).compose("up", "-d", check=False)
    assert "KEEPWARM_UID" in said or "user" in said
    assert "run `make secrets` first" in said
