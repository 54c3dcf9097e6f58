"""Which package may import which, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each package, and those that it may import.
PACKAGES = {
    "contracts": set(),
    "telemetry": {"contracts"},
    "node": {"contracts"},
    "models": {"contracts", "node"},
    "store": {"contracts"},
    "analysis": {"contracts", "store"},
    "broker": {"contracts", "node"},
    "producer": {"contracts", "broker"},
    "contexts": {"contracts", "models", "node", "telemetry"},
    "gpu_worker": {"contracts", "broker", "contexts", "models", "node", "telemetry"},
    "collector": {"contracts", "broker", "store", "telemetry"},
    "doctor": {"contracts", "broker", "contexts", "node", "store"},
}
PACKAGES["local"] = {*PACKAGES}
PACKAGES["cli"] = {*PACKAGES}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: an import path is a file path"
            assert node.module is not None
            assert node.module != "services", f"{file}: name the package's module"
            yield node.module


def files(repository: Path, package: str) -> list[Path]:
    found = sorted((repository / "services" / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_that_it_may(package: str, repository: Path) -> None:
    for file in files(repository, package):
        known = {name.split(".")[1] for name in imported(file) if name.startswith("services.")}
        assert known <= PACKAGES[package] | {package}, file


def test_supervision_imports_only_the_standard_library_and_psutil(repository: Path) -> None:
    module = repository / "services" / "node" / "supervision.py"
    names = {name.partition(".")[0] for name in imported(module)}
    assert names <= sys.stdlib_module_names | {"psutil", "keepwarm_start"}


def test_where_python_starts_nothing_is_imported_that_could_be_the_users(repository: Path) -> None:
    loaded = modules_after("import keepwarm_start; keepwarm_start.isolate()", repository)
    assert loaded <= modules_after("pass", repository) | {"keepwarm_start"}


def test_what_prepares_a_process_imports_no_library(repository: Path) -> None:
    names = {name.partition(".")[0] for name in imported(repository / "services/cli/process.py")}
    assert names <= sys.stdlib_module_names | {"services"}


@pytest.mark.parametrize("package", sorted(PACKAGES.keys() - {"broker"}))
def test_only_the_broker_package_imports_pika(package: str, repository: Path) -> None:
    for file in files(repository, package):
        assert "pika" not in {name.partition(".")[0] for name in imported(file)}, file


@pytest.mark.parametrize("package", PACKAGES)
def test_an_init_only_re_exports(package: str, repository: Path) -> None:
    tree = ast.parse(
        (repository / "services" / package / "__init__.py").read_text(encoding="utf-8")
    )
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert docstring or names or isinstance(node, ast.Import | ast.ImportFrom)


def modules_after(statement: str, repository: Path) -> set[str]:
    code = f"import sys; {statement}; print(*(name for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_worker_loads_neither_an_engine_nor_torch(repository: Path) -> None:
    loaded = modules_after("import services.gpu_worker", repository)
    assert not loaded & {"torch", "vllm", "transformers", "sqlalchemy"}


def test_submitting_and_validating_need_no_package_of_a_gpu_node(repository: Path) -> None:
    loaded = modules_after("import services.cli.submit, services.cli.validate", repository)
    assert "tokenizers" in loaded
    assert not loaded & {"pynvml", "torch", "vllm", "services.node.device"}


def test_the_workers_command_loads_nothing_for_terminals(repository: Path) -> None:
    loaded = modules_after("import services.cli.main, services.cli.worker", repository)
    assert {"structlog", "pika"} <= loaded
    assert not loaded & {"rich", "httpx", "torch", "vllm", "transformers", "huggingface_hub"}


@pytest.mark.parametrize(
    ("arguments", "verbs"),
    [(["--version"], set()), (["fly"], set()), (["contexts", "--help"], {"contexts"})],
    ids=" ".join,
)
def test_a_command_loads_only_the_verbs_that_it_runs_or_lists(
    arguments: list[str], verbs: set[str], repository: Path
) -> None:
    run = f"CliRunner().invoke(app, {arguments})"
    loaded = modules_after(
        f"from typer.testing import CliRunner; from services.cli.main import app; {run}", repository
    )
    files = {"run", "sweep", "submit", "worker", "status", "contexts", "broker", "dead"}
    assert {verb for verb in files if f"services.cli.{verb}" in loaded} == verbs


def test_no_verb_loads_the_libraries_of_statistics_before_it_is_run(repository: Path) -> None:
    verbs = "run, services.cli.report, services.cli.compare"
    loaded = modules_after(f"import services.cli.main, services.cli.{verbs}", repository)
    assert not loaded & {"numpy", "scipy", "services.analysis"}


def test_the_contracts_load_no_service(repository: Path) -> None:
    loaded = modules_after("import services.contracts", repository)
    assert not loaded & {"pika", "httpx", "sqlalchemy", "tokenizers", "typer"}


def test_a_clone_with_windows_line_ends_has_none_in_its_files(
    repository: Path, tmp_path: Path
) -> None:
    if not (repository / ".git").exists():
        pytest.skip("no repository of Git")
    clone = ["git", "-c", "core.autocrlf=true", "clone", "-q", "--no-local", "--depth=1"]
    subprocess.run([*clone, f"file://{repository}", str(tmp_path / "clone")], check=True)
    texts = [
        path
        for pattern in ("*.sh", "*.py", "*.jsonl", "Makefile", "*.yaml")
        for path in (tmp_path / "clone").rglob(pattern)
    ]
    assert len(texts) > 100
    assert [path for path in texts if b"\r\n" in path.read_bytes()] == []
