"""What the definition files do when an image is built, in scratch roots made with debootstrap.

Apptainer itself is not needed for it: %files is a copy, %post and %test are shell scripts.
The worker's image is built with the services' lock alone; vLLM for CUDA is several GB.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hpc.definitions import APPTAINER, read_definition

# What this machine reaches the network with, so that apt and pip do from the root as well.
_NETWORK_FILES = ("etc/ssl/certs/ca-certificates.crt", "etc/resolv.conf", "etc/hosts")
_NETWORK_VARIABLES = ("PIP_CERT", "PIP_INDEX_URL", "http_proxy", "https_proxy", "no_proxy")


@pytest.fixture(scope="module")
def bare_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian with nothing but what every Debian has."""
    assert os.geteuid() == 0, "chroot and debootstrap are root's"
    root = tmp_path_factory.mktemp("bare") / "root"
    try:
        command = [
            "debootstrap",
            "--variant=minbase",
            "--include=ca-certificates",
            "bookworm",
            root,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        yield root
    finally:
        remove(root)


@pytest.fixture
def root(bare_root: Path, tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    try:
        subprocess.run(["cp", "-a", bare_root, root], check=True)
        yield root
    finally:
        remove(root)


def remove(root: Path) -> None:
    # Nothing may be mounted in it: then removing it would remove what is mounted.
    assert str(root) not in Path("/proc/self/mounts").read_text()
    shutil.rmtree(root, ignore_errors=True)


def put_files(root: Path, files: list[tuple[Path, str]]) -> None:
    for source, target in files:
        place = root / target.removeprefix("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, place)


def give_network(root: Path) -> None:
    for name in _NETWORK_FILES:
        shutil.copy2(Path("/", name), root / name)
    own = Path("/usr/local/share/ca-certificates")
    if own.is_dir():
        shutil.copytree(own, root / own.relative_to("/"), dirs_exist_ok=True)


def run_in(root: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As Apptainer runs a section: the shell ends at the first error."""
    passed = {name: os.environ[name] for name in _NETWORK_VARIABLES if name in os.environ}
    return subprocess.run(
        ["chroot", root, "/bin/sh", "-e", "-c", script],
        env={
            **passed,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["worker", "control"])
def test_an_image_is_made_and_passes_its_test(name: str, root: Path) -> None:
    definition = read_definition(APPTAINER / f"{name}.def")
    put_files(root, definition.files)
    give_network(root)
    made = run_in(root, definition.sections["post"], KEEPWARM_LOCKS="services.lock")
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]

    inside = definition.sections["environment"]
    tested = run_in(root, inside + definition.sections["test"], KEEPWARM_LOCKS="services.lock")
    assert tested.returncode == 0, tested.stdout + tested.stderr

    verb = "worker" if name == "worker" else "collect"
    asked = run_in(root, f"{inside}\nset -- {verb} --help\n{definition.sections['runscript']}")
    assert asked.returncode == 0 and "Usage" in asked.stdout, asked.stdout + asked.stderr
    # Of the image, and not of the place where it was made; without the tests' tools.
    where = (
        "import services, importlib.metadata as m; print(services.__file__, m.version('keepwarm'))"
    )
    found = run_in(root, f'{inside}\ncd /; python3 -c "{where}"')
    assert found.stdout.startswith("/opt/keepwarm/venv/"), found.stdout + found.stderr
    assert run_in(root, f"{inside}\ncommand -v pytest ruff mypy").returncode != 0
