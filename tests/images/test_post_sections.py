"""What the definition files do when an image is built, in scratch roots made with debootstrap.

Apptainer itself is not needed for it: %files is a copy, %post and %test are shell scripts.
The worker's image is built with the services' lock alone; vLLM for CUDA is several GB.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian import give_network, make_root, network_variables, remove_root
from tests.hpc.definitions import APPTAINER, read_definition


@pytest.fixture(scope="module")
def bare_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("bare") / "root"
    try:
        make_root(root)
        yield root
    finally:
        remove_root(root)


@pytest.fixture
def root(bare_root: Path, tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    try:
        subprocess.run(["cp", "-a", bare_root, root], check=True)
        yield root
    finally:
        remove_root(root)


def put_files(root: Path, files: list[tuple[Path, str]]) -> None:
    for source, target in files:
        place = root / target.removeprefix("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, place)


def run_in(root: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As Apptainer runs %test and %runscript: the shell goes on after an error. That of %post would
    end there; it has to do so by itself.
    """
    return subprocess.run(
        ["chroot", root, "/bin/sh", "-c", script],
        env={
            **network_variables(),
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
