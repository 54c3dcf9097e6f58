"""docker-compose.yml in a copy of the project, as an operator has it in front of them."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.compose.daemon import Daemon, run
from tests.compose.images import without_digest
from tests.conftest import DEMO_MODEL, REPOSITORY

# What compose and the builds read; not the copy's own secrets, results or environment.
_PARTS = (
    *(".dockerignore", "Dockerfile", "Makefile", "README.md", "docker-compose.yml", "grafana"),
    *("keepwarm_start.py", "prometheus", "pyproject.toml", "rabbitmq", "samples", "services"),
    "setup",
)
_FILES = ("-f", "docker-compose.yml", "-f", "override.yml")
# Reads what `status --json --watch` prints, a list of runs a line, until a run is complete.
_UNTIL_COMPLETE = """
import json, sys
told = (run for line in sys.stdin for run in json.loads(line))
sys.exit(not any(run["run_id"] == sys.argv[1] and run["complete"] for run in told))
"""


def compose_command() -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


class Stack:
    """Calls compose there; `with_secrets` first."""

    def __init__(self, directory: Path, daemon: Daemon) -> None:
        self.directory = directory
        self._daemon = daemon
        self._command = compose_command()
        directory.mkdir()
        for part in _PARTS:
            source, target = REPOSITORY / part, directory / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        for file in (directory / "Dockerfile", directory / "docker-compose.yml"):
            file.write_text(without_digest(file.read_text()))
        shutil.copy2(REPOSITORY / "tests" / "compose" / "override.yml", directory)

    def with_secrets(self, **variables: str) -> "Stack":
        """As `make secrets` makes them, with settings in .env beside them."""
        run("make", "secrets", environment=self.environment, cwd=self.directory)
        with (self.directory / ".env").open("a") as file:
            file.write(f"COMPOSE_PROJECT_NAME=keepwarm\nKEEPWARM_MODELS={DEMO_MODEL.parent}\n")
            file.write("COMPOSE_PROFILES=cpu\nKEEPWARM_MODEL=/models/SmolLM2-135M-Instruct\n")
            file.writelines(f"{name}={value}\n" for name, value in variables.items())
        return self

    @property
    def environment(self) -> dict[str, str]:
        # No PYTHONPATH of this repository, no address of another daemon.
        return {**self._daemon.environment, "PYTHON": "python3"}

    def compose(self, *arguments: str, check: bool = True, **variables: str) -> str:
        return run(
            *(*self._command, *_FILES, *arguments),
            environment={**self.environment, **variables},
            check=check,
            cwd=self.directory,
        )

    def run(self, service: str, *arguments: str, standard_input: str = "") -> str:
        """A command in a container of its own; what it prints on standard output."""
        command = [*self._command, *_FILES, "run", "--rm", "-T", service, *arguments]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.directory,
            input=standard_input,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def inside(self, service: str, *command: str, index: int = 1) -> str:
        """A command in a container that runs."""
        return self.compose("exec", "-T", "--index", str(index), service, *command)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What docker knows of them."""
        ids = self.compose("ps", "-q", service).split()
        return self.inspect(*ids) if ids else []

    def inspect(self, *containers: str) -> list[dict[str, Any]]:
        return json.loads(self._daemon.docker("inspect", *containers))

    def loopback(self, url: str) -> str:
        """What this machine's loopback, as the daemon knows it, answers at a published port."""
        return self._daemon.docker(
            *("run", "--rm", "--network", "host", "--entrypoint", "wget", "prom/prometheus:v3.5.0"),
            *("-q", "-O", "-", url),
        )

    def submit(self, *arguments: str, standard_input: str = "") -> str:
        """The run's id."""
        said = self.run("producer", "submit", *arguments, standard_input=standard_input)
        return said.strip().splitlines()[-1]

    def statuses(self) -> list[dict[str, Any]]:
        """Of every run, as the store has them."""
        return json.loads(self.run("operator", "status", "--json"))

    def complete(self, run_id: str, seconds: int = 300) -> dict[str, Any]:
        """Its report, once every claim has an outcome."""
        # One process that tells every second: to start one takes time from the engine.
        told = f"timeout {seconds} keepwarm status --json --watch --every 1 2>/dev/null"
        until = (f'{told} | python3 -c "$1" "$2"', "sh", _UNTIL_COMPLETE, run_id)
        self.inside("collector", "sh", "-c", *until)
        return json.loads(self.inside("collector", "keepwarm", "report", run_id, "--json"))

    def engines(self) -> list[dict[str, Any]]:
        """The engines that the keeper has."""
        said = self.inside("gpu-worker", "keepwarm", "contexts", "list", "--json")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]
