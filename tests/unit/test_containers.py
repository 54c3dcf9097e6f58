"""What docker-compose.yml and the Dockerfile promise, read from the files; no Docker is needed.

`make test-compose` runs them.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from services.broker.roles import ROLES
from services.cli.secrets_dir import SecretsDir
from services.contracts import load_settings
from services.contracts.bounds import MAX_MESSAGE_BYTES
from services.store import Store

OWN = ("collector", "producer", "gpu-worker", "engine-cpu", "engine-cuda")
ENDS = ("broker-setup", "producer", "operator")  # they do one thing, and are not there for ever
TARGETS = ("collector", "producer", "gpu-worker", "engine")
TAG = r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*|[a-z]+:\d+\.\d+-[a-z]+"
DIGEST = r"@sha256:[0-9a-f]{64}"
BASE = re.compile(rf"debian:bookworm-\d{{8}}-slim{DIGEST}")


@pytest.fixture(scope="module")
def file(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def services(file: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return file["services"]


@pytest.fixture(scope="module")
def stages(repository: Path) -> dict[str, str]:
    """Each stage of the Dockerfile, with the instructions of those that it is built on."""
    stages: dict[str, str] = {}
    text = (repository / "Dockerfile").read_text()
    for source, name, instructions in re.findall(
        r"^FROM (\S+) AS (\S+)\n((?:(?!FROM ).*\n)*)", text, re.M
    ):
        stages[name] = stages.get(source, f"{source}\n") + instructions
    return stages


def test_every_service_is_closed_and_bounded(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].split(":")[0] not in ("", "0", "root"), name
        assert service["mem_limit"] and service["pids_limit"], name
        assert service["logging"]["options"]["max-size"], name
        assert "privileged" not in service and "cap_add" not in service, name
        assert service.get("healthcheck") or name in OWN, name  # ours have one in the image
        assert service["restart"] == ("no" if name in ENDS else "unless-stopped"), name


def test_every_image_is_pinned(
    services: dict[str, dict[str, Any]], stages: dict[str, str], repository: Path
) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for name, service in services.items():
        digest = "" if "build" in service else DIGEST
        assert re.fullmatch(f"(?:{TAG}){digest}", service["image"]), name
        if "build" in service:
            assert service["image"].endswith(f":{project['version']}"), name
            assert service["build"]["target"] in TARGETS, name
    assert all(BASE.fullmatch(stage.partition("\n")[0]) for stage in stages.values())


def test_the_broker_forgets_no_unsettled_message(services: dict[str, dict[str, Any]]) -> None:
    """As versions before 4.1.1 may: docs/decisions/0026."""
    version = re.search(r":(\d+)\.(\d+)\.(\d+)", services["rabbitmq"]["image"])
    assert version is not None and tuple(map(int, version.groups())) >= (4, 1, 1)


@pytest.mark.parametrize("name", ["rabbitmq/rabbitmq.conf", "apptainer/broker.sh"])
def test_a_broker_takes_our_largest_message_and_none_that_is_much_larger(
    name: str, repository: Path
) -> None:
    found = re.search(r"^max_message_size *= *(\d+)$", (repository / name).read_text(), re.M)
    assert found is not None and MAX_MESSAGE_BYTES < int(found[1]) <= 2 * MAX_MESSAGE_BYTES


def test_what_prometheus_reads_is_bounded_and_so_is_where_workers_may_send_it(
    repository: Path,
) -> None:
    text = (repository / "prometheus" / "prometheus.yml").read_text()
    jobs = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    for name, job in jobs.items():
        limited = job.keys() >= {"sample_limit", "body_size_limit"}
        assert limited or name == "prometheus", name
    (kept,) = (
        rule["regex"]
        for rule in jobs["keepwarm-workers"]["relabel_configs"]
        if rule.get("action") == "keep" and rule["source_labels"] == ["__address__"]
    )
    assert re.fullmatch(kept, "gpu-worker-2:9464")
    for address in ("169.254.169.254:80", "rabbitmq:15672", "evil.example.org:9464"):
        assert not re.fullmatch(kept, address), address


def test_ports_are_published_on_loopback_alone(services: dict[str, dict[str, Any]]) -> None:
    published = {name: port for name, each in services.items() for port in each.get("ports", ())}
    assert published.keys() == {"rabbitmq", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published.values())
    assert not any(each.get("network_mode") == "host" for each in services.values())


def test_passwords_are_files_and_a_service_has_its_own_alone(
    file: dict[str, Any], repository: Path
) -> None:
    text = (repository / "docker-compose.yml").read_text()
    for line in text.splitlines():
        name, _, value = line.strip().partition(":")
        if "PASSWORD" in name and not name.startswith("#"):
            assert value.strip().startswith("/run/secrets/"), line
    has = {name: each.get("secrets", []) for name, each in file["services"].items()}
    assert has["gpu-worker"] == ["worker", "hf_token"]
    assert has["producer"] == ["producer", "hf_token"]
    assert has["collector"] == ["collector", "postgres"]
    assert has["engine-cpu"] == has["engine-cuda"] == ["hf_token"] and not has["prometheus"]
    for secret in file["secrets"].values():
        assert secret["file"].startswith("./secrets/")


def test_only_those_that_need_it_have_a_way_out(services: dict[str, dict[str, Any]]) -> None:
    for name in ("collector", "operator", "postgres"):
        assert services[name]["networks"] == ["inside"], name


def test_the_command_to_build_after_a_change_builds_every_image(
    services: dict[str, dict[str, Any]], repository: Path
) -> None:
    page = (repository / "docs" / "getting-started.md").read_text()
    command = re.search(r"^docker compose (.+) build +# or cuda$", page, re.MULTILINE)[1]
    named = set(re.findall(r"--profile (\S+)", command))
    for other in ("cpu", "cuda"):
        started = (named - {"cpu"}) | {other}
        built = {
            service["image"]
            for service in services.values()
            if "build" in service and (started & set(service.get("profiles", started)))
        }
        assert built == {
            services[name]["image"] for name in OWN if not name.startswith("engine")
        } | {services[f"engine-{other}"]["image"]}


def test_a_copy_of_the_store_goes_there_and_back(
    services: dict[str, dict[str, Any]], repository: Path, tmp_path: Path
) -> None:
    """The commands of the page, without the containers: `operator` has both places."""
    page = (repository / "docs" / "operations.md").read_text()
    (backup,) = re.findall(r"^backup='(.+)'$", page, re.MULTILINE)
    ways = re.findall(r'operator -c "\$backup" (\S+) (\S+)$', page, re.MULTILINE)
    assert len(ways) == 2 and ways[0] == ways[1][::-1]
    places = {volume.split(":")[-1] for volume in services["operator"]["volumes"]}
    assert {str(Path(name).parent) for name in ways[0]} == places
    assert services["operator"]["environment"]["KEEPWARM_STORE_URL"].endswith(f"{ways[0][0]}}}")
    store, copy = (tmp_path / Path(name).name for name in ways[0])
    Store.open(load_settings(store_url=str(store))).close()
    subprocess.run([sys.executable, "-c", backup, store, copy], check=True)
    store.write_bytes(b"")
    subprocess.run([sys.executable, "-c", backup, copy, store], check=True)
    Store.open(load_settings(store_url=str(store)), create=False).close()


def test_standard_input_is_kept_on_a_disk(services: dict[str, dict[str, Any]]) -> None:
    producer = services["producer"]
    place = producer["environment"]["TMPDIR"]
    assert any(volume.endswith(f":{place}") for volume in producer["volumes"])
    assert not any(tmpfs.startswith(f"{place}:") for tmpfs in producer["tmpfs"])


def test_a_worker_and_its_engines_share_their_places(services: dict[str, dict[str, Any]]) -> None:
    worker = services["gpu-worker"]["volumes"]
    assert worker == services["engine-cpu"]["volumes"] == services["engine-cuda"]["volumes"]
    assert {"node:/run/keepwarm", "cache:/var/cache/keepwarm"} <= set(worker)
    users = {services[name]["user"] for name in OWN}
    assert len(users) == 1


def test_a_container_has_longer_to_end_than_its_service(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in OWN:
        assert int(services[name]["stop_grace_period"].removesuffix("s")) >= 40


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_keeps_the_rules(target: str, stages: dict[str, str]) -> None:
    image, builder = stages[target], stages[f"{target}-builder"]
    as_root, _, as_user = image.partition("USER 10001:10001")
    assert f"COPY --from={target}-builder" in as_root and "RUN" not in as_user
    assert as_root.rindex("image.sh sbom") > as_root.rindex("COPY")
    assert "STOPSIGNAL SIGTERM" in image and "HEALTHCHECK" in image
    assert 'ENTRYPOINT ["tini", "--"' in image and "CMD [" in as_user
    assert "ADD " not in builder + image and "latest" not in builder + image
    if target != "engine":  # for CUDA it keeps a compiler, and says why
        assert not re.search(r"gcc|clang|build-essential|-dev\b|engine-", builder + image)


def test_images_are_alike_where_engines_are_named_by_it(stages: dict[str, str]) -> None:
    """A worker's variables that an engine reads are a part of the engine's name."""
    names = {
        found
        for target in ("engine", "gpu-worker")
        for found in re.findall(r"\b(?:HF_HOME|PYTHONNOUSERSITE)=\S+", stages[target])
    }
    assert len(names) == 2


def test_images_hold_neither_secrets_nor_results(repository: Path) -> None:
    lines = (repository / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "!"))] == [
        "*",
        "**/__pycache__",
    ]
    taken = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert set(taken) == {
        *("README.md", "keepwarm_start.py", "pyproject.toml", "services"),
        *("setup/health.py", "setup/image.sh"),
        *("setup/requirements", "setup/sbom.py", "setup/unneeded.py"),
    }


@pytest.mark.parametrize("lock", ["services", "engine-cpu", "engine-cuda"])
def test_every_package_of_a_lock_has_a_hash(lock: str, repository: Path) -> None:
    text = (repository / "setup" / "requirements" / f"{lock}.lock").read_text()
    packages = re.split(r"^(?=[a-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.M), flags=re.M)[1:]
    assert len(packages) > 80
    for package in packages:
        assert re.match(r"[a-z0-9-]+(\[[a-z0-9,-]+\])?==[^ ]+ ", package), package
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package


def test_the_bill_of_an_image_names_what_is_installed(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", repository / "setup" / "sbom.py", sys.prefix],
        capture_output=True,
        text=True,
        check=True,
    )
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    urls = [component["purl"] for component in bill["components"]]
    assert urls == sorted(set(urls)) == [each["bom-ref"] for each in bill["components"]]
    assert any(url.startswith("pkg:deb/debian/dpkg@") for url in urls)
    listed = {url.removeprefix("pkg:pypi/") for url in urls if url.startswith("pkg:pypi/")}
    place = Path(sysconfig.get_paths(vars={"base": sys.prefix})["purelib"])
    here = {
        f"{re.sub('[-_.]+', '-', each.metadata['Name']).lower()}@{quote(each.version)}"
        for each in distributions(path=[str(place)])
    }
    assert listed == here


# setup/compose_secrets.py, in a checkout of its own.


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    script = tmp_path / "setup" / "compose_secrets.py"
    script.parent.mkdir()
    script.write_bytes((repository / "setup" / "compose_secrets.py").read_bytes())
    return tmp_path


def make_secrets(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, checkout / "setup" / "compose_secrets.py"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def contents(checkout: Path) -> dict[str, str]:
    files = [checkout / ".env", *(f for f in (checkout / "secrets").rglob("*") if f.is_file())]
    return {str(file.relative_to(checkout)): file.read_text() for file in files}


def test_secrets_are_made_for_one_user_alone(checkout: Path, file: dict[str, Any]) -> None:
    done = make_secrets(checkout)
    assert done.returncode == 0, done.stderr
    made = contents(checkout)
    assert {each["file"].removeprefix("./") for each in file["secrets"].values()} < made.keys()
    passwords = [text.strip() for name, text in made.items() if name.endswith(".password")]
    assert len(set(passwords)) == len(passwords) == 7
    assert all(len(password) == 64 for password in passwords)
    assert not any(password in done.stdout for password in passwords)
    secrets = checkout / "secrets"
    for path in (secrets, *secrets.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    uid = int(re.search(r"KEEPWARM_UID=(\d+)", made[".env"])[1])
    assert uid != 0 and {path.stat().st_uid for path in secrets.rglob("*")} == {uid}


def test_the_broker_is_set_up_with_them(checkout: Path) -> None:
    make_secrets(checkout)
    directory = SecretsDir(checkout / "secrets" / "broker")
    assert all(directory.read(role.name) for role in ROLES)
    admin = (checkout / "secrets" / "admin.password").read_text().strip()
    conf = (checkout / "secrets" / "rabbitmq-admin.conf").read_text()
    assert conf == f"default_user = keepwarm-admin\ndefault_pass = {admin}\n"


def test_directories_are_made_that_docker_would_make_as_root(
    checkout: Path, file: dict[str, Any]
) -> None:
    make_secrets(checkout)
    bound = {
        volume.split(":-")[1].partition("}")[0]
        for service in file["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("${")
    }
    assert bound == {"./.models", "./results", "./samples"}
    uid = int(re.search(r"KEEPWARM_UID=(\d+)", (checkout / ".env").read_text())[1])
    for name in (".models", "results"):
        assert (checkout / name).stat().st_uid == uid


def test_what_containers_read_can_be_read_by_all(checkout: Path, file: dict[str, Any]) -> None:
    """Prometheus is a user of its own, whatever the checkout's umask was."""
    mounted = [
        volume.split(":")[0].removeprefix("./")
        for service in file["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("./") and "secrets" not in volume
    ]
    assert "prometheus" in mounted
    for name in mounted:
        place = checkout / name
        place.parent.mkdir(mode=0o700, exist_ok=True)
        place.write_text("") if "." in name else place.mkdir(mode=0o700)
        inner = place if place.is_file() else place / "file"
        inner.write_text("")
        inner.chmod(0o600)
    assert make_secrets(checkout).returncode == 0
    for name in mounted:
        for path in (checkout / name, *(checkout / name).rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert (checkout / "secrets").stat().st_mode & 0o777 == 0o700


def test_models_that_are_there_are_kept_as_they_are(checkout: Path) -> None:
    (checkout / ".models").mkdir(mode=0o755)
    before = (checkout / ".models").stat()
    make_secrets(checkout)
    assert (checkout / ".models").stat() == before


def test_what_is_there_is_kept(checkout: Path) -> None:
    (checkout / ".env").write_text("KEEPWARM_MODEL=mine\n")
    make_secrets(checkout)
    before = contents(checkout)
    assert before[".env"].startswith("KEEPWARM_MODEL=mine\n")
    assert before[".env"].count("KEEPWARM_MODEL") == 1
    (checkout / "secrets" / "grafana.password").unlink()
    again = make_secrets(checkout)
    assert "1 passwords made, 6 kept" in again.stdout
    after = contents(checkout)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"secrets/grafana.password"}


# setup/health.py


@pytest.fixture
def answering() -> Iterator[tuple[HTTPServer, list[int]]]:
    codes = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/healthz"
            self.send_response(codes[0])
            self.end_headers()
            self.wfile.write(b"the reason\n")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server, codes
    server.shutdown()
    thread.join()
    server.server_close()


def health(repository: Path, address: str) -> subprocess.CompletedProcess[str]:
    """With more patience than in a container, whose check would be over."""
    script = (repository / "setup" / "health.py").read_text()
    return subprocess.run(
        [sys.executable, "-I", "-c", script.replace("_SECONDS = 4.0", "_SECONDS = 60.0")],
        env={"KEEPWARM_METRICS_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("code", "expected"), [(200, 0), (503, 1)])
def test_the_health_check_returns_the_services_answer(
    repository: Path, answering: tuple[HTTPServer, list[int]], code: int, expected: int
) -> None:
    server, codes = answering
    codes[0] = code
    done = health(repository, f"0.0.0.0:{server.server_address[1]}")
    assert (done.returncode, done.stdout) == (expected, "the reason\n"), done.stderr


@pytest.mark.parametrize("address", ["", "off", "127.0.0.1:0", "127.0.0.1:1"])
def test_the_health_check_fails_where_nobody_answers(repository: Path, address: str) -> None:
    done = health(repository, address)
    assert done.returncode == 1 and done.stderr
