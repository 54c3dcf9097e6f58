"""How fast claims move when the model costs nothing: producer, broker, worker, collector.

    .venv/bin/python benchmarks/pipeline.py

Starts a RabbitMQ node of its own and the real commands as processes of their own; the engine is the
tests' stand-in, which answers at once. Prints claims/s of each part alone and of the whole way from
a file to SQLite, beside the broker alone with the same messages, and the peak memory of every
service at two sizes. Rates are over the whole command, start-up included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

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
from services.contexts.keeper_client import drain  # noqa: E402
from services.contracts import (  # noqa: E402
    ClaimBatch,
    RunAnnouncement,
    Verdict,
    VerdictBatch,
    decode,
    encode,
    load_settings,
    topology,
)
from services.contracts.proofs import verdict_proof  # noqa: E402
from services.contracts.wire import Message  # noqa: E402
from tests.interpreters import interpreter  # noqa: E402

MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
FEVER = REPOSITORY.parent / "shared" / "data" / "fever_labelled_dev.jsonl"
KEEPWARM = [sys.executable, "-m", "services.cli.main"]
console = Console(width=110)


@dataclass
class Finished:
    """What a part took: wall seconds, processor seconds (of its own process) and peak memory."""

    seconds: float
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0


class Command:
    """A `keepwarm` command as a process, with its peak memory."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*KEEPWARM, *arguments],
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if arguments[0] == "worker" else subprocess.DEVNULL,
        )
        self._seen = psutil.Process(self._process.pid)
        self._peak_bytes = 0
        threading.Thread(target=self._watch_memory, daemon=True).start()

    def wait_for_line(self, text: bytes) -> None:
        for line in self._process.stderr:
            if text in line:
                # Keep the pipe empty from now on.
                subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL)
                return
        raise SystemExit("the worker ended; run it by hand to see why")

    def _watch_memory(self) -> None:
        # ru_maxrss would do, were it not inherited from this process at the fork.
        while True:
            try:
                self._peak_bytes = max(self._peak_bytes, self._seen.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.05)

    def wait(self) -> Finished:
        _, status, usage = os.wait4(self._process.pid, 0)
        if status:
            raise SystemExit(f"a command failed: {self._process.args}")
        return Finished(
            time.monotonic() - self._started,
            usage.ru_utime + usage.ru_stime,
            self._peak_bytes / 2**20,
        )

    def terminate(self) -> Finished:
        self._process.terminate()
        return self.wait()


def write_claims(path: Path, count: int) -> None:
    """FEVER's claims where they are at hand, else the samples; again and again with new ids."""
    source = FEVER if FEVER.exists() else REPOSITORY / "samples" / "claims.jsonl"
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            line = lines[number % len(lines)]
            file.write(json.dumps({**line, "id": number}) + "\n")


def take_all(address: BrokerAddress, queue: str, context: str, messages: int) -> list[bytes]:
    declares = Declares("if-missing", (context,))
    with Consumer(address, "drain", queues=[queue], prefetch=500, declares=declares).open(
        10
    ) as consumer:
        bodies = []
        while len(bodies) < messages:
            delivery = consumer.take(10)
            if delivery is None:
                raise SystemExit(f"{queue} held {len(bodies)} of {messages} messages")
            bodies.append(delivery.body)
            consumer.acknowledge([delivery])
    return bodies


def as_verdicts(body: bytes) -> bytes:
    batch = decode(ClaimBatch, body)
    return encode(
        VerdictBatch(
            schema_version=batch.schema_version,
            run_id=batch.run.run_id,
            batch_id=batch.batch_id,
            labels=batch.run.prompt.label_names,
            verdicts=tuple(
                Verdict(
                    claim_id=claim.claim_id,
                    position=claim.position,
                    text=claim.text,
                    gold=claim.gold,
                    label=batch.run.prompt.label_names[0],
                    probabilities=(0.85, 0.1, 0.05),
                    mass=0.9,
                    raw_text="True",
                    prompt_tokens=80,
                )
                for claim in batch.claims
            ),
            worker_id="benchmark",
            device="none",
            attempt=1,
            engine_seconds=0.001,
            submission_id=batch.submission_id,
            proofs=tuple(map(verdict_proof, batch.proofs, (c.evidence for c in batch.claims))),
        )
    )


def publish_all(
    address: BrokerAddress, exchange: str, key: str, kind: type[Message], bodies: list[bytes]
) -> float:
    """Seconds until the broker has confirmed all."""
    with Publisher(address, "fill", window=128).open(10) as publisher:
        started = time.monotonic()
        for number, body in enumerate(bodies):
            publisher.publish(Outgoing(exchange, key, body, str(number), kind.wire_type))
        publisher.flush()
        return time.monotonic() - started


def measure(count: int, batch_size: int) -> dict[str, Finished]:
    """Every part alone, then the whole way, with `count` claims."""
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-benchmark-") as name,
        PrivateNode(Path(name) / "node") as node,
    ):
        directory = Path(name)
        claims = directory / "claims.jsonl"
        write_claims(claims, count)
        environment = {
            **os.environ,
            "KEEPWARM_ENGINE_PYTHON": str(interpreter(directory / "doubles")),
            "KEEPWARM_BROKER_URL": node.url,
            "KEEPWARM_BROKER_PASSWORD": node.password,
            "KEEPWARM_MODEL": str(MODEL),
            "KEEPWARM_BATCH_SIZE": str(batch_size),
            "KEEPWARM_RUNTIME_DIR": str(directory / "run"),
            "KEEPWARM_LOG_LEVEL": "INFO",
        }
        address = BrokerAddress.from_settings(
            load_settings(broker_url=node.url, broker_password=node.password)
        )
        results: dict[str, Finished] = {}

        results["submit alone"] = Command(environment, "submit", str(claims)).wait()
        announced = take_all(address, topology.RUNS_QUEUE, "ctx-none", 2)
        run = decode(RunAnnouncement, announced[0]).run
        context = run.context.context_id
        queue = topology.claims_queue(context)
        bodies = take_all(address, queue, context, -(-count // batch_size))

        seconds = publish_all(address, topology.CLAIMS_EXCHANGE, queue, ClaimBatch, bodies)
        results["broker alone, claims in"] = Finished(seconds)
        started = time.monotonic()
        take_all(address, queue, context, len(bodies))
        results["broker alone, claims out"] = Finished(time.monotonic() - started)

        verdicts = [as_verdicts(body) for body in bodies]
        publish_all(
            address, topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE, VerdictBatch, verdicts
        )
        publish_all(
            address, topology.RUNS_EXCHANGE, topology.RUNS_QUEUE, RunAnnouncement, announced
        )
        alone = {**environment, "KEEPWARM_STORE_URL": str(directory / "alone.sqlite")}
        results["collect alone"] = Command(alone, "collect", "--until", run.run_id).wait()
        del bodies, verdicts

        whole = {**environment, "KEEPWARM_STORE_URL": str(directory / "whole.sqlite")}
        worker = Command(whole, "worker")
        worker.wait_for_line(b"worker.taking")
        started = time.monotonic()
        collect = Command(whole, "collect", "--until", run.run_id)
        without_store = {k: v for k, v in whole.items() if k != "KEEPWARM_STORE_URL"}
        submit = Command(without_store, "submit", str(claims))
        results["  its producer"] = submit.wait()
        results["  its collector"] = collect.wait()
        results["end to end"] = Finished(time.monotonic() - started)
        results["  its worker"] = worker.terminate()
        drain(load_settings(runtime_dir=directory / "run"))
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--claims", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")

    by_size = {count: measure(count, arguments.batch_size) for count in arguments.claims}
    table = Table(title=f"batches of {arguments.batch_size}, {os.cpu_count()} cores", box=None)
    table.add_column("part")
    for count in by_size:
        table.add_column(f"claims/s at {count:,}", justify="right")
        table.add_column("CPU µs a claim", justify="right")
        table.add_column("peak MiB", justify="right")
    for part in next(iter(by_size.values())):
        cells = []
        for count, results in by_size.items():
            found = results[part]
            cells.append("" if part.startswith("  ") else f"{count / found.seconds:,.0f}")
            cells.append(f"{found.cpu_seconds / count * 1e6:,.0f}" if found.cpu_seconds else "")
            cells.append(f"{found.peak_mib:,.0f}" if found.peak_mib else "")
        table.add_row(part, *cells)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    count: {part.strip(): vars(found) for part, found in results.items()}
                    for count, results in by_size.items()
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
