"""What a large fleet costs while nothing is computed: reports, notices, metrics, one collector.

    .venv/bin/python benchmarks/control_plane.py --workers 10000 --runs 1000 --claims 10000000

Starts a RabbitMQ node of its own and the real `keepwarm collect`. Workers are simulated by one
process that sends each worker's report when it is due. A few listeners hear the notices, and what
they hear is multiplied by the number of workers. The store (SQLite) holds the runs, spread over
contexts, with a row for each message of 64 verdicts, so everything that the collector counts is
there; the rows of single claims, which it does not read, are left out. Half of the runs are
unfinished, and one in twenty is cancelled. Prometheus' two requests are made as often as it makes
them.

Goals: the collector takes at most one core and 1 GiB, the control traffic at most 5 MB/s.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import structlog
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.broker import (  # noqa: E402
    BrokerAddress,
    Consumer,
    Declares,
    Outgoing,
    PrivateNode,
    Publisher,
)
from services.broker.private_node import free_ports  # noqa: E402
from services.contracts import (  # noqa: E402
    ContextSpec,
    PromptSpec,
    Run,
    WorkerHeartbeat,
    encode,
    load_settings,
    topology,
)
from services.contracts.heartbeats import HEARTBEAT_SECONDS  # noqa: E402
from services.store import Store  # noqa: E402
from services.store.schema import (  # noqa: E402
    deliveries,
    run_counts,
    runs,
    submissions,
    verdict_counts,
)

_BATCH_CLAIMS = 64
_LISTENERS = 20
_SCRAPE_SECONDS = {"/metrics": 15.0, "/sd": 10.0}
console = Console(width=110)


def contexts(count: int) -> list[ContextSpec]:
    return [ContextSpec(model=f"organisation/model-{number}") for number in range(count)]


def fill(store: Store, of: list[ContextSpec], run_count: int, claim_count: int) -> None:
    """Straight into the tables: what the collector reads of a run, as if it had been there."""
    prompt = PromptSpec()
    claims = claim_count // run_count
    batches = max(1, claims // _BATCH_CLAIMS)
    now = time.time()
    delivery = 0
    for number in range(run_count):
        run = Run(
            source=f"claims-{number}.jsonl",
            source_digest=f"src-{number}",
            context=of[number % len(of)],
            prompt=prompt,
        )
        answered = batches if number % 2 else batches // 2
        key = number + 1
        with store.transaction() as connection:
            connection.execute(
                insert(runs).values(
                    run_key=key,
                    run_id=run.run_id,
                    run=run.model_dump_json(),
                    lines=batches * _BATCH_CLAIMS,
                    claims=batches * _BATCH_CLAIMS,
                    repeated=0,
                    rejected=0,
                    first_seen=now - run_count + number,
                )
            )
            connection.execute(
                insert(submissions).values(
                    submission_id=f"sub-{number}",
                    run_key=key,
                    cancelled_at=now - 3_600 if number % 20 == 0 else None,
                )
            )
            rows = [
                {
                    "delivery_key": delivery + batch,
                    "run_key": key,
                    "batch_id": f"{batch}",
                    "worker_id": f"node-{batch % 100}",
                    "device": "NVIDIA A10",
                    "attempt": 1,
                    "engine_seconds": 1.0,
                    "fresh": _BATCH_CLAIMS,
                    "duplicates": 0,
                    "prompt_tokens": 100 * _BATCH_CLAIMS,
                    "received_at": now - 60 + batch / batches,
                }
                for batch in range(answered)
            ]
            connection.execute(insert(deliveries), rows)
            connection.execute(insert(run_counts).values(run_key=key, messages=answered))
            connection.execute(
                insert(verdict_counts).values(
                    run_key=key,
                    label="SUPPORTS",
                    verdicts=answered * _BATCH_CLAIMS,
                    judged=0,
                    correct=0,
                )
            )
        delivery += answered


def send_reports(
    publisher: Publisher, of: list[ContextSpec], workers: int, stop: threading.Event
) -> dict[str, int]:
    """Each worker's, in its turn, until told to stop. Messages and bytes that were sent."""
    bodies = [
        encode(
            WorkerHeartbeat(
                worker_id=f"node-{number:05}.cluster.example.org-4711-ab12",
                context_id=of[number % len(of)].context_id,
                device="NVIDIA A10",
                state="serving",
                claims_per_second=2.5,
                host=f"node-{number:05}.cluster.example.org",
                job_id=f"{number}",
                walltime_left_seconds=3_600.0,
                batches_in_hand=4,
                claims_in_hand=256,
                metrics_address=f"node-{number:05}.cluster.example.org:9464",
            )
        )
        for number in range(workers)
    ]
    sent = {"messages": 0, "bytes": 0}
    began, number = time.monotonic(), 0
    while not stop.is_set():
        due = int((time.monotonic() - began) * workers / HEARTBEAT_SECONDS)
        while number < due:
            body = bodies[number % workers]
            publisher.publish(
                Outgoing(
                    topology.HEARTBEATS_EXCHANGE,
                    "",
                    body,
                    kind=WorkerHeartbeat.__name__,
                    transient=True,
                )
            )
            sent["messages"] += 1
            sent["bytes"] += len(body)
            number += 1
        stop.wait(0.05)
    return sent


class Scraper(threading.Thread):
    """Asks as Prometheus does."""

    def __init__(self, address: str, path: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._url = f"http://{address}{path}"
        self._every_seconds = _SCRAPE_SECONDS[path]
        self._stop_asking = stop
        self.seconds: list[float] = []
        self.size_bytes = 0
        self.start()

    def run(self) -> None:
        while not self._stop_asking.wait(self._every_seconds):
            began = time.monotonic()
            with urllib.request.urlopen(self._url, timeout=60) as answer:
                self.size_bytes = len(answer.read())
            self.seconds.append(time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--claims", type=int, default=10_000_000)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long it is measured")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-bench-") as name,
        PrivateNode(Path(name) / "node") as node,
    ):
        measure(Path(name), node, arguments)


def measure(directory: Path, node: PrivateNode, arguments: argparse.Namespace) -> None:
    of = contexts(arguments.contexts)
    settings = load_settings(
        broker_url=node.url,
        broker_password=node.password,
        store_url=str(directory / "store.sqlite"),
    )
    console.print(f"filling the store with {arguments.runs:,} runs …")
    with Store.open(settings) as store:
        fill(store, of, arguments.runs, arguments.claims)
    (port,) = free_ports(1)
    with (directory / "collect.log").open("w") as output:
        collecting = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "collect"],
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("KEEPWARM_")},
                "KEEPWARM_BROKER_URL": node.url,
                "KEEPWARM_BROKER_PASSWORD": node.password,
                "KEEPWARM_STORE_URL": str(directory / "store.sqlite"),
                "KEEPWARM_METRICS_ADDRESS": f"127.0.0.1:{port}",
            },
        )
    try:
        watched = psutil.Process(collecting.pid)
        heard: list[int] = []
        address = BrokerAddress.from_settings(settings)
        every = tuple(context.context_id for context in of)
        stop = threading.Event()
        with Publisher(
            address, "fleet", window=10_000, declares=Declares("if-missing", every)
        ).open(60) as publisher:
            listeners = [
                Consumer(
                    address,
                    f"worker-{number}",
                    queues=[],
                    prefetch=1,
                    on_fanout_message=lambda body: heard.append(len(body)),
                    listener=f"bench-{number}",
                ).open(60)
                for number in range(_LISTENERS)
            ]
            sent: dict[str, int] = {}
            reporting = threading.Thread(
                target=lambda: sent.update(send_reports(publisher, of, arguments.workers, stop))
            )
            reporting.start()
            time.sleep(20)  # all workers are known by then, and every run was counted once
            scrapers = {path: Scraper(f"127.0.0.1:{port}", path, stop) for path in _SCRAPE_SECONDS}
            heard.clear()
            before, began = watched.cpu_times(), time.monotonic()
            peak = 0
            while time.monotonic() < began + arguments.seconds:
                if collecting.poll() is not None:
                    raise SystemExit((directory / "collect.log").read_text()[-4_000:])
                peak = max(peak, watched.memory_info().rss)
                time.sleep(0.2)
            seconds = time.monotonic() - began
            after = watched.cpu_times()
            notices, notice_bytes = len(heard) / _LISTENERS, sum(heard) / _LISTENERS
            stop.set()
            reporting.join()
            for listener in listeners:
                listener.close()
        cores = (after.user + after.system - before.user - before.system) / seconds
        all_seconds = seconds + 20
        traffic = sent["bytes"] / all_seconds * 2 + notice_bytes / seconds * arguments.workers
        table = Table("", "measured", "goal")
        table.add_row("collector, cores", f"{cores:.2f}", "<= 1")
        table.add_row("collector, peak MiB", f"{peak / 2**20:.0f}", "<= 1,024")
        table.add_row("control traffic, MB/s", f"{traffic / 1e6:.2f}", "<= 5")
        table.add_row("  reports/s", f"{sent['messages'] / all_seconds:,.0f}", "")
        table.add_row("  reports, MB/s in and out", f"{sent['bytes'] / all_seconds * 2e-6:.2f}", "")
        table.add_row("  seconds from notice to notice", f"{seconds / max(notices, 1):.1f}", "")
        table.add_row("  bytes of a notice", f"{notice_bytes / max(notices, 1):,.0f}", "")
        for path, scraper in scrapers.items():
            slowest = max(scraper.seconds, default=0.0)
            table.add_row(f"{path}, KiB", f"{scraper.size_bytes / 1024:,.0f}", "")
            table.add_row(f"{path}, slowest answer, s", f"{slowest:.2f}", "")
        console.print(table)
    finally:
        collecting.send_signal(signal.SIGTERM)
        collecting.wait(60)


if __name__ == "__main__":
    main()
