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
    from services.contexts.engine_command import CPU_BLOCK_TOKENS, engine_environment
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
        block_size=CPU_BLOCK_TOKENS if plan.device.kind == "cpu" else None,
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

    from services.contexts import pin_model
    from services.contracts import ContextSpec, PromptSpec
    from services.gpu_worker import CompiledPrompt, ModelTokenizer
    from services.producer import ClaimsFile, Selection, Source

    spec = pin_model(ContextSpec(model=str(MODEL), max_model_tokens=MAX_TOKENS))
    compiled = CompiledPrompt(PromptSpec(), ModelTokenizer.load(spec))
    with Source.open(str(claims_file)) as source:
        claims = list(ClaimsFile(source, compiled.spec, Selection(limit=limit)))
    return compiled.encode(claims), compiled.label_tokens, spec


class Keepwarm:
    """A node, a warm worker and a collector; `run` sends the claims once more, as a new run."""

    def __init__(self, directory: Path, batch_size: int) -> None:
        from benchmarks.desk import Desk

        self._batch_size = batch_size
        self._desk = Desk(
            directory,
            KEEPWARM_ENGINE_ARGUMENTS=(
                f"--no-enable-prefix-caching --max-num-seqs {MAX_SEQUENCES}"
            ),
        )
        self._worker, _ = self._desk.ready_worker()

    def run(self, claims_file: Path, limit: int, name: str) -> float:
        """Seconds from the opening of the file to the last verdict in the store."""
        from services.contexts import pin_model
        from services.contracts import ContextSpec, PromptSpec

        context = pin_model(ContextSpec(model=str(MODEL), max_model_tokens=MAX_TOKENS))
        started = time.monotonic()
        self._desk.wait_for(
            self._desk.publish(claims_file, PromptSpec(name=name), context, self._batch_size, limit)
        )
        return time.monotonic() - started

    @property
    def pids(self) -> list[int]:
        """Of the worker and of its engine."""
        from services.contexts.records import live_records

        records = live_records(self._desk.settings.runtime_dir)
        engines = [record.pid for record in records if record.pid is not None]
        return [self._worker.pid, *engines]

    def close(self) -> None:
        self._worker.terminate()
        self._worker.wait()
        self._desk.close()


@contextmanager
def suspended(pids: Sequence[int]) -> Iterator[None]:
    """Hold processes and all that they started: idle, an engine's threads still spin, and on few
    cores they would take their turns from the engine that is measured.
    """
    owners = map(psutil.Process, pids)
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
                with suspended(keepwarm.pids):
                    alone.stdin.write("go\n")
                    alone_seconds = float(alone.stdout.readline())
                with suspended([alone.pid]):
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
