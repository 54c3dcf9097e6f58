"""Break everything, again and again, while a run goes on; then count what was lost.

    .venv/bin/python benchmarks/chaos.py --seed 1 --seed 2

For each seed: a RabbitMQ node behind a proxy, a producer, workers and a collector as processes of
their own, the tests' engine, and a fault every second until every claim has an outcome. Which fault
hits whom is drawn from the seed alone. Whatever dies is started again, as a scheduler would. Some
of the claims are poison: they crash the engine each time, and must be the only dead ones. Prints
faults by kind, claims lost and doubled (both must be 0), verdicts that differ from those of the run
without faults (0), claims computed again, and the wall time against that run. Exit code 1 when a
promise was broken.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pika
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.broker import PrivateNode  # noqa: E402
from services.contexts.keeper_client import drain, engines  # noqa: E402
from services.contracts import load_settings, topology  # noqa: E402
from services.contracts.errors import BrokerError, KeeperError  # noqa: E402
from tests.interpreters import interpreter  # noqa: E402
from tests.proxy import Proxy  # noqa: E402

MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
FEVER = REPOSITORY.parent / "shared" / "data" / "fever_labelled_dev.jsonl"
SAMPLES = REPOSITORY / "samples" / "claims.jsonl"
KEEPWARM = [sys.executable, "-m", "services.cli.main"]
GRACE_SECONDS = 4
# RabbitMQ 3.10.8 loses a quorum queue when the node is killed within seconds of its creation.
YOUNG_QUEUE_SECONDS = 8.0
# Longer than anything takes to be started again, or to be noticed: then claims are lost.
SILENCE_SECONDS = 180.0
console = Console(width=110)


@dataclass
class Service:
    """A `keepwarm` process that is started again when it ends."""

    arguments: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*KEEPWARM, *self.arguments],
                env=self.environment,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill_group(self) -> None:
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        if self.alive:
            self.process.send_signal(number)

    def engine(self) -> psutil.Process | None:
        """The engine of its node, which it shares with nobody here."""
        with suppress(psutil.Error, KeeperError):
            for record in engines(self.runtime):
                if record.pid is not None:
                    return psutil.Process(record.pid)
        return None

    def keepers(self) -> list[psutil.Process]:
        """The processes above its engine: supervisor, guard, fork server and its own, keeper."""
        with suppress(psutil.Error):
            if (engine := self.engine()) is not None:
                return [
                    process
                    for process in engine.parents()
                    if ("services.cli.main" in process.cmdline() and "keeper" in process.cmdline())
                    or "fork_server.py" in " ".join(process.cmdline())
                ]
        return []

    @property
    def runtime(self) -> Path:
        return Path(self.environment["KEEPWARM_RUNTIME_DIR"])

    def end(self) -> None:
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(GRACE_SECONDS + 10)
            except subprocess.TimeoutExpired:
                self.kill_group()
                self.process.wait()


@dataclass
class Deployment:
    """Everything that takes part in one run."""

    directory: Path
    claims: Path
    workers_wanted: int
    claim_seconds: float
    node: PrivateNode = field(init=False)
    proxy: Proxy = field(init=False)
    workers: list[Service] = field(init=False)
    collector: Service = field(init=False)
    producer: Service = field(init=False)
    run_id: str | None = None
    started_again: int = 0
    broker_start_seconds: float = 0.0

    @property
    def store(self) -> Path:
        return self.directory / "store.sqlite"

    def __enter__(self) -> "Deployment":
        self.node = PrivateNode(self.directory / "node")
        self.node.start()
        self.proxy = Proxy(self.node.port)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("KEEPWARM_")},
            "KEEPWARM_ENGINE_PYTHON": str(interpreter(self.directory / "doubles")),
            "VLLM_TEST_CLAIM_SECONDS": str(self.claim_seconds),
            "VLLM_TEST_FAULT": "crash-long",
            "KEEPWARM_BROKER_URL": f"amqp://keepwarm@127.0.0.1:{self.proxy.port}/",
            "KEEPWARM_BROKER_PASSWORD": self.node.password,
            "KEEPWARM_BROKER_HEARTBEAT_SECONDS": "5",
            "KEEPWARM_STORE_URL": str(self.store),
            "KEEPWARM_MODEL": str(MODEL),
            "KEEPWARM_CACHE_DIR": str(self.directory / "cache"),
            "KEEPWARM_CONTEXT_IDLE_SECONDS": "60",
            "KEEPWARM_GRACE_SECONDS": str(GRACE_SECONDS),
            "KEEPWARM_ENGINE_REQUEST_TIMEOUT_SECONDS": "3",
            "KEEPWARM_ENGINE_START_ATTEMPTS": "20",
            "KEEPWARM_ENGINE_START_TIMEOUT_SECONDS": "15",
            "KEEPWARM_LOG_FORMAT": "json",
        }

        def service(name: str, *arguments: str) -> Service:
            # Each is on a node of its own.
            place = {"KEEPWARM_RUNTIME_DIR": str(self.directory / name)}
            return Service([*arguments], environment | place, self.directory / f"{name}.log")

        self.collector = service("collector", "collect")
        self.producer = service(
            "producer", "submit", str(self.claims), "--rejected", str(self.directory / "rejected")
        )
        self.workers = [service(f"worker-{n}", "worker") for n in range(self.workers_wanted)]
        for part in self.parts():
            part.start()
        return self

    def parts(self) -> list[Service]:
        return [self.collector, self.producer, *self.workers]

    def __exit__(self, *_: object) -> None:
        for part in self.parts():
            part.signal(signal.SIGTERM)
        for part in self.parts():
            part.end()
        for worker in self.workers:
            drain(load_settings(runtime_dir=worker.runtime))
        self.proxy.close()
        self.node.stop()

    def look_after(self) -> None:
        """Start again whatever has ended and is still needed."""
        if not self.node.alive:
            began = time.monotonic()
            self.node.start()
            self.broker_start_seconds += time.monotonic() - began
            self.started_again += 1
        for part in self.parts():
            if part.alive or (part is self.producer and part.process.returncode == 0):
                continue
            if part.process.returncode not in (0, -signal.SIGKILL):
                console.print(f"{part.log.name} ended with {part.process.returncode}")
            part.start()
            self.started_again += 1

    def outcomes(self) -> tuple[int, int | None]:
        """How many claims have one, and of how many, once the producer has said it."""
        try:
            with closing(
                sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=30)
            ) as store:
                (done,) = store.execute("SELECT count(*) FROM outcomes").fetchone()
                (claims,) = store.execute("SELECT claims FROM runs").fetchone() or (None,)
                return done, claims
        except sqlite3.OperationalError:  # not made yet
            return 0, None


class Faults:
    """What can go wrong, each as a method's effect that passes by itself."""

    def __init__(self, deployment: Deployment, seed: int, spared: str | None = None) -> None:
        self._deployment = deployment
        self._random = random.Random(seed)
        self._threads: list[threading.Thread] = []
        self._began = time.monotonic()
        self.count: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[], bool]] = {
            "worker SIGTERM": lambda: self._signal_worker(signal.SIGTERM),
            "worker SIGUSR1": lambda: self._signal_worker(signal.SIGUSR1),
            "worker SIGKILL": self._kill_worker,
            "engine SIGKILL": lambda: self._hit_engine(signal.SIGKILL),
            "engine hangs": lambda: self._hit_engine(signal.SIGSTOP),
            "keeper SIGKILL": self._kill_keeper,
            "collector SIGKILL": self._kill_collector,
            "producer SIGKILL": self._kill_producer,
            "broker SIGKILL": lambda: self._stop_broker(signal.SIGKILL),
            "broker SIGTERM": lambda: self._stop_broker(signal.SIGTERM),
            "connections cut": self._cut,
            "network black hole": self._black_hole,
            "store locked": self._lock_store,
            "disk full": self._fill_disk,
            "memory alarm": self._alarm,
            "foreign message": self._foreign_message,
        }
        if spared is not None:
            self.kinds = {k: f for k, f in self.kinds.items() if not k.startswith(spared)}

    def strike(self) -> None:
        """Draw a fault and let it happen. One that finds nobody to hit is drawn again."""
        for _ in range(10):
            kind = self._random.choice(list(self.kinds))
            if self.kinds[kind]():
                self.count[kind] += 1
                return

    def heal(self) -> None:
        for thread in self._threads:
            thread.join()

    def _later(self, seconds: float, undo: Callable[[], None]) -> None:
        def wait() -> None:
            time.sleep(seconds)
            undo()

        self._threads.append(threading.Thread(target=wait))
        self._threads[-1].start()

    def _worker(self) -> Service:
        return self._random.choice(self._deployment.workers)

    def _signal_worker(self, number: int) -> bool:
        worker = self._worker()
        worker.signal(number)
        return worker.alive

    def _kill_worker(self) -> bool:
        worker = self._worker()
        was_alive = worker.alive
        worker.kill_group()
        return was_alive

    def _hit_engine(self, number: int) -> bool:
        return _send(self._worker().engine(), number)

    def _kill_keeper(self) -> bool:
        keepers = self._worker().keepers()
        return _send(self._random.choice(keepers) if keepers else None, signal.SIGKILL)

    def _kill_collector(self) -> bool:
        self._deployment.collector.kill_group()
        return True

    def _kill_producer(self) -> bool:
        was_alive = self._deployment.producer.alive
        self._deployment.producer.kill_group()
        return was_alive

    def _stop_broker(self, number: int) -> bool:
        process = self._deployment.node.process()
        if process is None or time.monotonic() - self._began < YOUNG_QUEUE_SECONDS:
            return False
        process.send_signal(number)
        return True

    def _cut(self) -> bool:
        self._deployment.proxy.cut()
        return True

    def _black_hole(self) -> bool:
        self._deployment.proxy.black_hole()
        self._later(self._random.uniform(1, 8), self._deployment.proxy.heal)
        return True

    def _lock_store(self) -> bool:
        if not self._deployment.store.exists():
            return False
        store = sqlite3.connect(self._deployment.store, timeout=5, check_same_thread=False)
        try:
            store.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            store.close()
            return False
        self._later(self._random.uniform(1, 3), store.close)
        return True

    def _fill_disk(self) -> bool:
        """No file of the collector's may grow: for SQLite the disk is full."""
        collector = self._deployment.collector
        if not collector.alive or not self._deployment.store.exists():
            return False
        pid = collector.process.pid
        size = self._deployment.store.stat().st_size
        _limit_file_size(pid, str(size))
        self._later(2.0, lambda: _limit_file_size(pid, "unlimited"))
        return True

    def _alarm(self) -> bool:
        if not self._deployment.node.alive:
            return False
        node = self._deployment.node

        def set_limit(*limit: str) -> None:
            with suppress(BrokerError):  # it was killed meanwhile, which ends the alarm as well
                node.control("set_vm_memory_high_watermark", *limit)

        self._later(0, lambda: set_limit("absolute", "1"))
        self._later(3, lambda: set_limit("0.4"))
        return True

    def _foreign_message(self) -> bool:
        exchange, key = self._random.choice(
            [
                (topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
                (topology.RUNS_EXCHANGE, topology.RUNS_QUEUE),
                (topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE),
                (topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE),
            ]
        )
        try:
            connection = pika.BlockingConnection(
                pika.ConnectionParameters(
                    "127.0.0.1",
                    self._deployment.node.port,
                    credentials=pika.PlainCredentials("keepwarm", self._deployment.node.password),
                    socket_timeout=1,
                    blocked_connection_timeout=1,
                )
            )
            connection.channel().basic_publish(exchange, key, self._random.randbytes(64))
            connection.close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True


def _send(process: psutil.Process | None, number: int) -> bool:
    with suppress(psutil.Error):
        if process is not None:
            process.send_signal(number)
            return True
    return False


def _limit_file_size(pid: int, limit: str) -> None:
    subprocess.run(
        ["prlimit", f"--pid={pid}", f"--fsize={limit}:unlimited"], check=False, capture_output=True
    )


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    seconds: float
    claims: int
    outcomes: dict[str, str]
    rows: int
    duplicates: int
    lost_work: int
    returned: int
    dead: frozenset[str]
    faults: Counter[str]
    started_again: int
    broker_start_seconds: float


def run(
    deployment: Deployment,
    seed: int | None,
    fault_seconds: float,
    limit_seconds: float,
    spared: str | None = None,
) -> Result:
    """Raises SystemExit where it is not complete in time, or nothing comes any more."""
    started = time.monotonic()
    with deployment, progress() as bar:
        faults = Faults(deployment, seed or 0, spared)
        shown = bar.add_task("without faults" if seed is None else f"seed {seed}", total=None)
        strikes_at = started + fault_seconds
        done, came_at = 0, started
        while True:
            before, (done, claims) = done, deployment.outcomes()
            bar.update(shown, completed=done, total=claims)
            if done == claims:
                break
            deployment.look_after()
            now = time.monotonic()
            if done > before:
                came_at = now
            if seed is not None and now >= strikes_at:
                faults.strike()
                strikes_at = now + fault_seconds
            if now - started > limit_seconds or now - came_at > SILENCE_SECONDS:
                faults.heal()
                raise SystemExit(
                    f"not complete after {now - started:.0f} s, of which nothing came for "
                    f"{now - came_at:.0f}: {done:,} of {claims or 0:,} claims; "
                    "logs and stores stay with --keep"
                )
            time.sleep(0.1)
        seconds = time.monotonic() - started
        faults.heal()
        while (
            not deployment.node.alive
            or deployment.producer.alive
            or deployment.producer.process.returncode
        ):
            deployment.look_after()
            time.sleep(0.1)
    with closing(sqlite3.connect(deployment.store)) as store:
        claims, returned = store.execute(
            "SELECT claims, returned FROM runs JOIN run_counts USING (run_key)"
        ).fetchone()
        rows = store.execute("SELECT claim_id, label, reason FROM outcomes").fetchall()
        duplicates, lost_work = store.execute(
            "SELECT sum(duplicates), sum(CASE WHEN attempt > 1 THEN fresh + duplicates ELSE 0 END) "
            "FROM deliveries"
        ).fetchone()
    return Result(
        seconds,
        claims,
        {claim: label or reason for claim, label, reason in rows},
        len(rows),
        duplicates,
        lost_work,
        returned,
        frozenset(claim for claim, label, _ in rows if label is None),
        faults.count,
        deployment.started_again,
        deployment.broker_start_seconds,
    )


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def write_claims(path: Path, count: int, poison: int) -> frozenset[str]:
    """Claims of FEVER's where they are at hand, else the samples, with new ids; the poison ones'
    ids are returned.
    """
    source = FEVER if FEVER.exists() else SAMPLES
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    bad = frozenset(str(count * (n + 1) // (poison + 1)) for n in range(poison))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = lines[number % len(lines)]["claim"]
            line = {"id": str(number), "claim": text[:300]}
            if str(number) in bad:
                line["evidence"] = "This claim crashes the tests' engine. " * 60
            file.write(json.dumps(line) + "\n")
    return bad


@contextmanager
def directory(keep: bool) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        yield path
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--claims", type=int, default=100_000)
    parser.add_argument("--poison", type=int, default=3, help="claims that crash the engine")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, action="append", help="may be given several times")
    parser.add_argument(
        "--spare-producer",
        action="store_true",
        help="never kill the producer: a file that is submitted again masks what was lost before",
    )
    parser.add_argument("--fault-seconds", type=float, default=1.0, help="between two faults")
    parser.add_argument("--claim-seconds", type=float, default=0.001, help="the engine's time each")
    parser.add_argument("--limit-seconds", type=float, default=1_800, help="give a run up after")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--keep", action="store_true", help="keep logs and stores")
    given = parser.parse_args()

    with directory(given.keep) as base:
        claims = base / "claims.jsonl"
        poison = write_claims(claims, given.claims, given.poison)

        def deployment(name: str) -> Deployment:
            (base / name).mkdir()
            return Deployment(base / name, claims, given.workers, given.claim_seconds)

        console.print(f"logs and stores: {base}", highlight=False)
        calm = run(deployment("calm"), None, 0, given.limit_seconds)
        console.print(f"without faults: {calm.seconds:.1f} s", highlight=False)
        figures = []
        for seed in given.seed or [1]:
            result = run(
                deployment(f"seed-{seed}"),
                seed,
                given.fault_seconds,
                given.limit_seconds,
                "producer" if given.spare_producer else None,
            )
            figures.append(figures_of(seed, result, calm, poison))
            console.print(f"seed {seed}: {result.seconds:.1f} s", highlight=False)
        show(figures)
        if given.json:
            given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if any(broken(each) for each in figures) else 0


def figures_of(seed: int, result: Result, calm: Result, poison: frozenset[str]) -> dict:
    return {
        "seed": seed,
        "faults": dict(result.faults),
        "claims": result.claims,
        "lost": result.claims - len(result.outcomes),
        "doubled": result.rows - len(result.outcomes),
        "differing": sum(
            result.outcomes.get(claim) != outcome for claim, outcome in calm.outcomes.items()
        ),
        "wrongly dead": len(result.dead ^ poison),
        "came twice": result.duplicates,
        "computed again, at most": result.lost_work,
        "returned": result.returned,
        "started again": result.started_again,
        "seconds in which the broker started": round(result.broker_start_seconds, 1),
        "seconds": round(result.seconds, 1),
        "seconds without faults": round(calm.seconds, 1),
        "ratio": round(result.seconds / calm.seconds, 2),
    }


def broken(figures: dict) -> bool:
    return any(figures[name] for name in ("lost", "doubled", "differing", "wrongly dead"))


def show(figures: list[dict]) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for each in figures:
        table.add_column(f"seed {each['seed']}", justify="right")
    kinds = sorted({kind for each in figures for kind in each["faults"]})
    for kind in kinds:
        table.add_row(f"fault: {kind}", *(str(each["faults"].get(kind, 0)) for each in figures))
    table.add_row("faults in all", *(str(sum(each["faults"].values())) for each in figures))
    for name in list(figures[0])[2:]:
        table.add_row(name, *(f"{each[name]:,}" for each in figures))
    console.print(table, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
