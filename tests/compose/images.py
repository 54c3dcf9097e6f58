"""Stand-ins for images of a registry, under their names, and then the project's own."""

import re
import subprocess
from pathlib import Path

import yaml

from tests.compose.daemon import Daemon
from tests.conftest import REPOSITORY
from tests.debian import give_network, make_root, network_variables, remove_root

BASE = "debian:bookworm-20260918-slim"
# What Debian 12 has in their places: RabbitMQ 3.10, PostgreSQL 15, Prometheus 2.42; and no Grafana.
STAND_INS = ("rabbitmq", "postgres", "prometheus")
OWN = ("collector", "producer", "gpu-worker", "engine-cpu")
_HERE = Path(__file__).resolve().parent


def image_of(service: str) -> str:
    file = (REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8")
    return without_digest(yaml.safe_load(file)["services"][service]["image"])


def without_digest(text: str) -> str:
    """Images by their tags alone: stand-ins come from no registry, and so have no digest of one."""
    return re.sub(r"@sha256:[0-9a-f]{64}", "", text)


def make_base(daemon: Daemon) -> None:
    """A Debian that reaches the network as this machine does."""
    if daemon.docker("images", "--quiet", BASE).strip():
        return  # kept from an earlier test
    root = daemon.directory / "root"
    try:
        make_root(root)
        give_network(root)
        _give_pip(root)
        # As in Debian's images: no package starts its service, and none waits for the disk.
        (root / "etc/dpkg/dpkg.cfg.d/docker-apt-speedup").write_text("force-unsafe-io\n")
        policy = root / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        command = ["tar", "-C", root, "-c", "."]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as packed:
            daemon.docker("import", "-", BASE, stdin=packed.stdout)
        assert packed.returncode == 0
    finally:
        remove_root(root)


def _give_pip(root: Path) -> None:
    """What pip is told here in variables, as a file."""
    told = network_variables()
    lines = [f"{option} = {told[name]}" for name, option in _FOR_PIP.items() if name in told]
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]))


_FOR_PIP = {"PIP_CERT": "cert", "PIP_INDEX_URL": "index-url", "PIP_FIND_LINKS": "find-links"}


def make_stand_ins(daemon: Daemon) -> None:
    for service in STAND_INS:
        daemon.docker(
            *("build", "--quiet", "--network", "host", "--target", service),
            *("--tag", image_of(service), _HERE / "standins"),
        )
