"""What Keepwarm costs on top of the engine: the same claims through it and through vLLM alone.

    .venv/bin/python benchmarks/engine_overhead.py

Both hold the same model with the same arguments, warm, in one run; they take turns, so that a
machine whose speed drifts treats them alike, and who waits is suspended. "Alone" is vLLM's own
`LLM.generate` on ready token ids, in a process of its own, nothing else around it. "Keepwarm" is
everything from the first line of the file to the last verdict in the store. Prefix caching is off,
for the same claims come again every round. Prints claims/s per round and the median of the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
SYMMETRIC = REPOSITORY.parent / "shared" / "data" / "fever_symmetric_dev.jsonl"
SAMPLES = REPOSITORY / "samples" / "claims.jsonl"
MAX_TOKENS = 1024
MAX_SEQUENCES = 64
console = Console(width=100)


def serve_alone(claims_file: Path, limit: int) -> None:
    """vLLM in this process: at each line on standard input, all claims once; seconds on output."""
    from services.contexts import find_device
    from services.contexts.engine_command import engine_environment
    from services.contexts.plan import EnginePlan
    from services.contracts import load_settings

    prompt, tokens, spec = prompts_of(claims_file, limit)
    plan = EnginePlan.of(spec, find_device(), load_settings())
    os.environ.update(engine_environment(plan, Path(tempfile.gettempdir()) / "keepwarm-alone"))
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's own words go to standard error
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(MODEL),
        dtype="bfloat16",
        max_model_len=MAX_TOKENS,
        max_num_seqs=MAX_SEQUENCES,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        generation_config="vllm",
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(tokens))
    ready = [{"prompt_token_ids": ids} for ids in prompt]
    llm.generate(ready[:8], parameters, use_tqdm=False)
    output.write("ready\n")
    for _ in sys.stdin:
        started = time.monotonic()
        answers = llm.generate(ready, parameters, use_tqdm=False)
        assert len(answers) == len(ready)
        output.write(f"{time.monotonic() - started}\n")


def prompts_of(claims_file: Path, limit: int):
    """The token ids that a worker would send, the label tokens, and the context."""
    from itertools import islice

    from services.contexts import pin_model
    from services.contracts import ContextSpec, PromptSpec
    from services.gpu_worker import CompiledPrompt, ModelTokenizer
    from services.producer import Parser, Source

    spec = pin_model(ContextSpec(model=str(MODEL), max_model_tokens=MAX_TOKENS))
    compiled = CompiledPrompt(PromptSpec(), ModelTokenizer.load(spec))
    with Source.open(str(claims_file)) as source:
        parser = Parser(source, compiled.spec)
        claims = [parser.parse(line) for line in islice(source.lines(), limit)]
    return compiled.encode(claims), compiled.label_tokens, spec


class Keepwarm:
    """A node, a warm worker and a collector; `run` sends the claims once more, as a new run."""

    def __init__(self, directory: Path, batch_size: int) -> None:
        from services.broker import PrivateNode
        from services.collector import Collector, Store
        from services.contracts import load_settings

        self._batch_size = batch_size
        self._node = PrivateNode(directory / "node")
        self._node.start()
        self._settings = load_settings(
            broker_url=self._node.url,
            broker_password=self._node.password,
            store_url=str(directory / "store.sqlite"),
        )
        self._store = Store.open(self._settings)
        self._collector = Collector(self._store, self._settings)
        self._committed = threading.Event()
        self._thread = threading.Thread(
            target=self._collector.run, args=(lambda _: self._committed.set(),)
        )
        self._thread.start()
        self._worker_settings = load_settings(runtime_dir=directory / "run")
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "worker", "--model", str(MODEL)],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "KEEPWARM_BROKER_URL": self._node.url,
                "KEEPWARM_BROKER_PASSWORD": self._node.password,
                "KEEPWARM_RUNTIME_DIR": str(directory / "run"),
                "KEEPWARM_ENGINE_ARGUMENTS": (
                    f"--no-enable-prefix-caching --max-num-seqs {MAX_SEQUENCES}"
                ),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self._worker.stderr:
            if "worker.taking" in line:
                break
        else:
            raise SystemExit("the worker ended; run it by hand to see why")
        threading.Thread(target=self._worker.stderr.read, daemon=True).start()

    def run(self, claims_file: Path, limit: int, name: str) -> float:
        """Seconds from the opening of the file to the last verdict in the store."""
        from services.broker import BrokerAddress, Declares, Publisher
        from services.collector import run_status
        from services.contexts import pin_model
        from services.contracts import ContextSpec, PromptSpec
        from services.producer import RejectedFile, Source, Submission

        spec = pin_model(ContextSpec(model=str(MODEL), max_model_tokens=MAX_TOKENS))
        with (
            Publisher(
                BrokerAddress.from_settings(self._settings),
                "benchmark",
                window=128,
                declares=Declares("always", (spec.context_id,)),
            ).open(10) as publisher,
            RejectedFile(Path(tempfile.gettempdir()) / "keepwarm-rejected.jsonl") as rejected,
        ):
            started = time.monotonic()
            with Source.open(str(claims_file)) as source:
                submission = Submission(
                    source,
                    source.survey(),
                    context=spec,
                    prompt=PromptSpec(name=name),
                    limit=limit,
                )
                submission.publish(publisher, rejected, batch_size=self._batch_size)
            while True:
                self._committed.wait(60)
                self._committed.clear()
                status = run_status(self._store, submission.run.run_id)
                if status is not None and status.complete:
                    return time.monotonic() - started

    @property
    def worker_pid(self) -> int:
        return self._worker.pid

    @property
    def engine_pids(self) -> list[int]:
        from services.contexts.records import live_records

        records = live_records(self._worker_settings.runtime_dir)
        return [record.pid for record in records if record.pid is not None]

    def close(self) -> None:
        from services.contexts.attachment import drain

        self._worker.terminate()
        self._worker.wait()
        drain(self._worker_settings)
        self._collector.stop()
        self._thread.join()
        self._store.close()
        self._node.stop()


@contextmanager
def suspended(pid: int, engines: Sequence[int] = ()) -> Iterator[None]:
    """Hold a process and all that it started: idle, an engine's threads still spin, and on few
    cores they would take their turns from the engine that is measured.
    """
    owners = [psutil.Process(pid), *map(psutil.Process, engines)]
    processes = [p for owner in owners for p in (owner, *owner.children(recursive=True))]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--claims", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")
    file = SYMMETRIC if SYMMETRIC.exists() else SAMPLES
    if arguments.alone:
        serve_alone(file, arguments.claims)
        return

    count = min(arguments.claims, sum(1 for _ in file.open("rb")))
    alone = subprocess.Popen(
        [sys.executable, __file__, "--alone", "--claims", str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    with tempfile.TemporaryDirectory(prefix="keepwarm-benchmark-") as name:
        keepwarm = Keepwarm(Path(name), arguments.batch_size)
        try:
            assert alone.stdout.readline() == "ready\n", "vLLM alone did not start"
            rounds = []
            for number in range(arguments.rounds + 1):
                with suspended(keepwarm.worker_pid, keepwarm.engine_pids):
                    alone.stdin.write("go\n")
                    alone_seconds = float(alone.stdout.readline())
                with suspended(alone.pid):
                    keepwarm_seconds = keepwarm.run(file, count, f"round {number}")
                if number:  # the first round warms both up
                    rounds.append((count / alone_seconds, count / keepwarm_seconds))
        finally:
            keepwarm.close()
            alone.stdin.close()
            alone.wait()

    table = Table(title=f"{count} claims of {file.name}, warm, batches of {arguments.batch_size}")
    for column in ("round", "vLLM alone, claims/s", "Keepwarm, claims/s", "ratio"):
        table.add_column(column, justify="right")
    for number, (by_itself, through) in enumerate(rounds, 1):
        table.add_row(
            str(number), f"{by_itself:.2f}", f"{through:.2f}", f"{through / by_itself:.3f}"
        )
    ratio = statistics.median(through / by_itself for by_itself, through in rounds)
    table.add_row("median", "", "", f"{ratio:.3f}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"claims": count, "rounds": rounds, "ratio": ratio}))


if __name__ == "__main__":
    main()
