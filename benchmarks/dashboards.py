"""Previews of the dashboards: a fleet that loses workers, watched by a real Prometheus.

    .venv/bin/python benchmarks/dashboards.py

Starts a broker, a keeper, a collector, Prometheus with the files of prometheus/ (every second, so
that minutes are enough), and a fleet: a worker with the real engine and the demo model, and workers
on nodes that seem to have GPUs, with the tests' engine, for this machine has none. Nodes are taken
away by real signals, claims die, the broker has an alarm. Then it draws docs/dashboard-*.png.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from grafana.preview import Span, draw_all  # noqa: E402
from tests.integration.conftest import Command  # noqa: E402
from tests.monitoring.system import System, whole_system  # noqa: E402

MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
# Seconds a claim: what a GPU is to the tests' engine.
FLEET = {"NVIDIA H100 80GB HBM3": 0.004, "NVIDIA A10": 0.012, "Tesla T4": 0.03}


class Fleet:
    """Workers on GPUs that come and go, until told to stop."""

    def __init__(self, system: System, seed: int) -> None:
        self._system = system
        self._draw = random.Random(seed)
        self._living: list[tuple[str, Command]] = []

    def grow(self, number: int) -> None:
        for gpu in list(FLEET)[:number] * (1 if number < len(FLEET) else 2):
            self._add(gpu)

    def lose_one(self) -> None:
        """To a signal or without a word; another comes in its place."""
        place = self._draw.randrange(len(self._living))
        gpu, worker = self._living.pop(place)
        if self._draw.random() < 0.4:
            worker.signal(signal.SIGKILL)
        else:
            worker.signal(signal.SIGTERM)
        self._add(gpu)

    def end(self) -> None:
        for _, worker in self._living:
            worker.signal(signal.SIGTERM)
        for _, worker in self._living:
            worker.wait()

    def _add(self, gpu: str) -> None:
        worker = self._system.worker(
            gpu,
            VLLM_TEST_CLAIM_SECONDS=str(FLEET[gpu]),
            VLLM_TEST_START_SECONDS=str(self._draw.randrange(3, 12)),
            KEEPWARM_GRACE_SECONDS="1",
        )
        self._living.append((gpu, worker))


def story(system: System, seconds: float, seed: int) -> None:
    system.submit(24, unreadable=True)
    system.submit(40_000, long=8)
    real = system.worker()
    fleet = Fleet(system, seed)
    fleet.grow(3)
    began = time.monotonic()
    alarm_at, more_at = 0.75 * seconds, 0.3 * seconds
    while (now := time.monotonic() - began) < seconds:
        time.sleep(seconds / 24)
        if now > more_at:
            fleet.grow(2)
            more_at = seconds
        if now > alarm_at:
            system.publish_nonsense()
            system.node.control("set_vm_memory_high_watermark", "0.000001")
            time.sleep(seconds / 16)
            system.node.control("set_vm_memory_high_watermark", "0.4")
            alarm_at = seconds
        fleet.lose_one()
    fleet.end()
    real.signal(signal.SIGTERM)
    real.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-dashboards-") as name,
        whole_system(Path(name), MODEL, real_engine=True) as system,
    ):
        start = time.time()
        story(system, 60 * arguments.minutes, arguments.seed)
        span = Span(start, time.time())
        for file in draw_all(system.prometheus.url, span, 1.0, arguments.out):
            print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
