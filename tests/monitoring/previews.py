"""Previews of the dashboards: a fleet that loses workers, watched by a real Prometheus.

    .venv/bin/python -m tests.monitoring.previews

Starts a broker, a keeper, a collector, Prometheus with the files of prometheus/ (every second, so
that minutes are enough), and a fleet: a worker with the real engine and the demo model, and workers
on nodes that seem to have GPUs, with the tests' engine, for this machine has none. Nodes are taken
away by real signals, claims die, the broker has an alarm. Then it draws docs/dashboard-*.png.
"""

import argparse
import random
import signal
import tempfile
import time
from itertools import count
from pathlib import Path

from grafana.preview import Span, draw_all
from tests.conftest import DEMO_MODEL, REPOSITORY
from tests.integration.conftest import Command
from tests.monitoring.system import System, whole_system

# Seconds a claim: what a GPU is to the tests' engine.
GPUS = {"NVIDIA H100 80GB HBM3": 0.01, "NVIDIA A10": 0.03, "Tesla T4": 0.08}
LOSSES = 24


class Fleet:
    """Workers on GPUs that come and go."""

    def __init__(self, system: System, seed: int) -> None:
        self._system = system
        self._draw = random.Random(seed)
        self._nodes = count(1)
        self._living: list[tuple[str, int, Command]] = []

    def grow(self) -> None:
        """A node of each kind more."""
        for gpu in GPUS:
            self._add(gpu, next(self._nodes))

    def lose_one(self) -> None:
        """To a signal or without a word. The next comes to the same node, or to a new one."""
        gpu, node, worker = self._living.pop(self._draw.randrange(len(self._living)))
        worker.signal(signal.SIGKILL if self._draw.random() < 0.4 else signal.SIGTERM)
        self._add(gpu, node if self._draw.random() < 0.7 else next(self._nodes))

    def _add(self, gpu: str, node: int) -> None:
        worker = self._system.worker(
            gpu,
            node,
            VLLM_TEST_CLAIM_SECONDS=str(GPUS[gpu]),
            VLLM_TEST_START_SECONDS=str(10 + 10 * list(GPUS).index(gpu)),
            KEEPWARM_GRACE_SECONDS="1",  # too short to finish what is in hand: some is returned
        )
        self._living.append((gpu, node, worker))


def story(system: System, seconds: float, seed: int) -> None:
    """After it the fleet is still at work."""
    system.submit(24, unreadable=True)
    system.submit(100_000, long=8)
    system.worker()
    fleet = Fleet(system, seed)
    fleet.grow()
    for number in range(LOSSES):
        time.sleep(seconds / LOSSES)
        if number == LOSSES // 3:
            fleet.grow()
        if number == LOSSES * 2 // 3:
            system.publish_nonsense()
            system.node.control("set_vm_memory_high_watermark", "0.000001")
            time.sleep(seconds / LOSSES)
            system.node.control("set_vm_memory_high_watermark", "0.4")
        fleet.lose_one()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs")
    arguments = parser.parse_args()
    if not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-dashboards-") as name,
        whole_system(Path(name), DEMO_MODEL, real_engine=True) as system,
    ):
        start = time.time()
        story(system, 60 * arguments.minutes, arguments.seed)
        span = Span(start, time.time())
        for file in draw_all(system.prometheus.url, span, 1.0, arguments.out):
            print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
