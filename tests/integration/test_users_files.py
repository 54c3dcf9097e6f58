"""A project of the user's own, whose files are called as modules of ours and of Python's are."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import sample_lines
from tests.integration.conftest import PATIENCE
from tests.integration.runs import write_claims

OURS = ("keepwarm_start", "services/__init__", "services/broker", "services/node")
PYTHONS = ("secrets", "random", "queue")
LIBRARIES = ("structlog", "psutil", "vllm/__init__", "sitecustomize")
NEVER_IMPORTED = "raise SystemExit(f'a file of the user was imported: {__file__}')\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    (directory / "services").mkdir(parents=True)
    (directory / "vllm").mkdir()
    write_claims(directory / "claims.jsonl", sample_lines()[:8])
    return directory


def occupy(directory: Path, *modules: str) -> None:
    for module in modules:
        (directory / f"{module}.py").write_text(NEVER_IMPORTED)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The console script, as pip writes it."""
    file = tmp_path / "bin" / "keepwarm"
    file.parent.mkdir()
    file.write_text("import sys\nfrom keepwarm_start import main\nsys.exit(main())\n")
    return file


def keepwarm(script: Path, project: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=project,
        env={
            k: v for k, v in environment.items() if not k.startswith(("KEEPWARM_BROKER", "STORE"))
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_files_in_the_working_directory_are_never_imported(
    script: Path, project: Path, environment: dict[str, str]
) -> None:
    occupy(project, *OURS, *PYTHONS, *LIBRARIES)
    assert "accuracy" in keepwarm(script, project, environment, "run", "claims.jsonl")


@pytest.mark.parametrize("path", ["{}", ":{}", "."])
def test_what_pythonpath_names_takes_no_modules_place(
    script: Path, project: Path, environment: dict[str, str], path: str
) -> None:
    occupy(project, *OURS[1:], *PYTHONS, *LIBRARIES[:-1])
    environment["PYTHONPATH"] = path.format(project)
    assert "accuracy" in keepwarm(script, project, environment, "run", "claims.jsonl")


def test_nor_by_a_keeper_and_its_engines(
    script: Path, project: Path, environment: dict[str, str]
) -> None:
    occupy(project, *OURS, *PYTHONS, *LIBRARIES)
    assert "warm" in keepwarm(script, project, environment, "contexts", "warm")
