"""All of Keepwarm under a real Prometheus: broker, keeper, collector, workers as wanted."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from services.broker import PrivateNode
from services.broker.private_node import free_ports
from services.contracts import topology
from tests.conftest import REPOSITORY, end_keeper, sample_lines
from tests.integration.conftest import (
    Command,
    clean_environment,
    commands,
    send,
    wait_until,
)
from tests.integration.runs import write_claims
from tests.interpreters import DOUBLES, interpreter
from tests.monitoring.prometheus import Prometheus

PROMPT = REPOSITORY / "samples" / "prompt.yaml"
Start = Callable[..., Command]


@dataclass
class System:
    """Its parts. Workers are started by hand, so that they can be lost."""

    directory: Path
    node: PrivateNode
    prometheus: Prometheus
    collecting: Command
    keeping: Command
    environment: dict[str, str]
    _start: Start
    _python_with_gpus: Path
    _runtime: Path
    _numbers: Iterator[int]

    def worker(self, gpu: str | None = None, node: int = 0, **variables: str) -> Command:
        """One on this node, by the keeper that runs as a service; or on another node, which seems
        to have a GPU of that name.
        """
        if gpu is None:
            return self._start("worker", **variables)
        directory = self._runtime.parent / f"node-{node}"
        return self._start(
            "worker",
            python=self._python_with_gpus,
            KEEPWARM_ENGINE_PYTHON=str(self._python_with_gpus),
            NVML_TEST_GPU=gpu,
            KEEPWARM_RUNTIME_DIR=str(directory),
            KEEPWARM_CACHE_DIR=str(directory / "cache"),
            **variables,
        )

    def submit(self, claims: int, *, long: int = 0, unreadable: bool = False) -> str:
        """So many claims, made of the samples, some too long for any context; the run's id.
        `unreadable`: the prompt asks for more certainty than any answer has.
        """
        number = next(self._numbers)
        lines = [
            {**line, "id": f"{number}-{n}"}
            for n, line in zip(range(claims), _again_and_again(), strict=False)
        ]
        for line in lines[: long * 10 : 10]:
            line["evidence"] = "A long sentence. " * 600
        file = write_claims(self.directory / f"claims-{number}.jsonl", lines)
        prompt = self.directory / f"prompt-{unreadable}.yaml"
        more = "minimum_mass: 0.9999\n" if unreadable else ""
        prompt.write_text(PROMPT.read_text(encoding="utf-8") + more, encoding="utf-8")
        submitting = self._start(
            *("submit", str(file), "--batch-size", "8", "--prompt", str(prompt)),
            KEEPWARM_ORDER_BY_EVIDENCE="false",  # the long ones are among the first
        )
        assert submitting.wait() == 0, submitting.output
        return submitting.lines[-1].strip()

    def cancel(self, run: str) -> None:
        cancelling = self._start("cancel", run)
        assert cancelling.wait() == 0, cancelling.output

    def publish_nonsense(self, messages: int = 1) -> None:
        """Where verdicts are expected."""
        bodies = [b"nonsense"] * messages
        send(self.node, topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE, *bodies)


@contextmanager
def whole_system(
    directory: Path, model: Path, *, real_engine: bool = False, hurry: bool = True
) -> Iterator[System]:
    with (
        tempfile.TemporaryDirectory(prefix="kw-") as short,
        PrivateNode(directory / "node", plugins=["rabbitmq_prometheus"]) as node,
    ):
        runtime = Path(short) / "run"
        collector_port, keeper_port = free_ports(2)
        addresses = {
            "collector:9464": f"127.0.0.1:{collector_port}",
            "engine:9464": f"127.0.0.1:{keeper_port}",
            '"[0-9a-z-]+:9464"': '"127[.]0[.]0[.]1:[0-9]+"',
            "rabbitmq:15692": f"127.0.0.1:{node.plugin_ports['rabbitmq_prometheus']}",
        }
        environment = {
            **clean_environment(),
            "KEEPWARM_BROKER_URL": node.url,
            "KEEPWARM_BROKER_PASSWORD": node.password,
            "KEEPWARM_STORE_URL": str(directory / "store.sqlite"),
            "KEEPWARM_MODEL": str(model),
            "KEEPWARM_RUNTIME_DIR": str(runtime),
            "KEEPWARM_CACHE_DIR": str(Path(short) / "cache"),
            "KEEPWARM_GRACE_SECONDS": "6",
            "KEEPWARM_BATCHES_IN_FLIGHT": "4",
            "KEEPWARM_LOG_FORMAT": "json",
        }
        if not real_engine:
            environment["KEEPWARM_ENGINE_PYTHON"] = str(interpreter(directory / "doubles"))
        try:
            with commands(environment) as start:
                collecting = start("collect", KEEPWARM_METRICS_ADDRESS=addresses["collector:9464"])
                keeping = start("keeper", KEEPWARM_METRICS_ADDRESS=addresses["engine:9464"])
                collecting.said("broker.connected")
                keeping.said("metrics.serving")
                with Prometheus(directory / "prometheus", addresses, hurry=hurry) as prometheus:
                    # What happens before it looks for the first time is no increase.
                    wait_until(prometheus.sees_all, "the first scrape of each service")
                    yield System(
                        *(directory, node, prometheus, collecting, keeping, environment),
                        start,
                        interpreter(directory / "gpus", DOUBLES / "gpus", DOUBLES),
                        *(runtime, count()),
                    )
        finally:
            for keeper in Path(short).iterdir():
                end_keeper(keeper)


def _again_and_again() -> Iterator[dict[str, str]]:
    while True:
        yield from sample_lines()
