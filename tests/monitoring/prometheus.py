"""A real Prometheus of a test's own, with the files of prometheus/."""

import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from services.broker.private_node import free_ports
from services.node.supervision import SupervisedProcess
from tests.conftest import REPOSITORY

FILES = REPOSITORY / "prometheus"
CONFIGURATION, RULES = FILES / "prometheus.yml", FILES / "alerts.yml"
_START_SECONDS, _STOP_SECONDS = 120.0, 10.0
_MINUTES = re.compile(r"\b(\d+)m\b")
_FOR = re.compile(r"\bfor: (\d+)m\b")
# Scrapes time out after a second here: a busy machine's stall of some seconds is to fire nothing.
_LEAST_FOR_SECONDS = 6


def hurried(text: str) -> str:
    """Minutes become seconds, and so do the ten seconds from one scrape to the next."""
    text = re.sub(r"\b10s\b", "1s", text)
    text = _FOR.sub(lambda found: f"for: {max(_LEAST_FOR_SECONDS, int(found[1]))}s", text)
    return _MINUTES.sub(r"\1s", text)


class Prometheus:
    """Use it as a context manager. It reads the files as they are committed, but for the addresses
    of what it asks, and, with `hurry`, for time.
    """

    def __init__(
        self, directory: Path, addresses: Mapping[str, str], *, hurry: bool = True
    ) -> None:
        """`addresses` has the address of each host that prometheus.yml names."""
        program = shutil.which("prometheus")
        assert program, "Debian's package prometheus is missing: setup/system.sh --with-prometheus"
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        directory.mkdir()
        configuration = CONFIGURATION.read_text(encoding="utf-8")
        for host, address in {**addresses, "localhost:9090": f"127.0.0.1:{port}"}.items():
            assert host in configuration, host
            configuration = configuration.replace(host, address)
        for file, text in (
            (CONFIGURATION, configuration),
            (RULES, RULES.read_text(encoding="utf-8")),
        ):
            (directory / file.name).write_text(hurried(text) if hurry else text, encoding="utf-8")
        self._log = directory / "log"
        self._command = [
            *(program, f"--config.file={directory / CONFIGURATION.name}", "--log.level=warn"),
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._process: SupervisedProcess | None = None

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = SupervisedProcess(
                self._command,
                environment={"PATH": os.environ["PATH"]},
                grace_seconds=_STOP_SECONDS,
                output=log,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self._process.exit_code() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"Prometheus did not start:\n{self._log.read_text()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stop()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What it is now: labels (`metric`) and value."""
        data = self._ask("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def value(self, expression: str) -> float | None:
        """The one value that it has; None where there is none."""
        found = self.query(expression)
        assert len(found) <= 1, (expression, found)
        return float(found[0]["value"][1]) if found else None

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        data = self._ask("query_range", query=expression, start=start, end=end, step=step)
        return list(data["result"])

    def names(self) -> set[str]:
        """Of every metric that it has."""
        return set(self._ask("label/__name__/values"))

    def targets(self) -> dict[str, list[str]]:
        """The health of each target, by job."""
        found: dict[str, list[str]] = {}
        for target in self._ask("targets", state="active")["activeTargets"]:
            found.setdefault(target["labels"]["job"], []).append(target["health"])
        return found

    def sees_all(self) -> bool:
        """Whether it has scraped all that the file names; workers come later."""
        jobs = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))["scrape_configs"]
        fixed = {job["job_name"] for job in jobs if "static_configs" in job}
        return {job for job, health in self.targets().items() if health == ["up"]} >= fixed

    def rules(self) -> list[dict[str, Any]]:
        """Alert rules, as they were last evaluated."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        return {
            alert["labels"]["alertname"]
            for alert in self._ask("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def _ask(self, page: str, **parameters: object) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{page}", params=parameters, timeout=30).json()  # type: ignore[arg-type]
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
