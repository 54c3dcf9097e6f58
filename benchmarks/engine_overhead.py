"""What Keepwarm costs on top of the engine: the same claims through it and through vLLM alone.

    .venv/bin/python benchmarks/engine_overhead.py

"Alone" is the fastest that vLLM can be made on this machine: its own `LLM.generate` on ready token
ids, in one process, with all cores and its own settings of threads, and the fastest of several
numbers of tokens a step, each with the model compiled and not. "Keepwarm" is everything from the
first line of the file to the last verdict in the store, with its defaults (with `--compiled`, with
an engine that compiles the model, which on processors is not the default). Both hold the same
model, warm; they take turns, so that a machine whose speed drifts treats them alike, and who waits
is suspended. Prefix caching is off in both, for the same claims come again every round. Each round
takes a few claims and many: their difference gives the rate without the start and the tail, and
what is left is the fixed seconds.
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
from dataclasses import asdict, dataclass
from itertools import product, starmap
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
STEP_TOKENS = (1_024, 2_048)
TRIED_CLAIMS = 128
console = Console(width=100)


@dataclass(frozen=True)
class Speed:
    """Of one side in one round."""

    claims_a_second: float
    fixed_seconds: float

    @classmethod
    def of(cls, few: int, few_seconds: float, many: int, many_seconds: float) -> "Speed":
        rate = (many - few) / (many_seconds - few_seconds)
        return cls(rate, few_seconds - few / rate)


@dataclass(frozen=True)
class EngineSettings:
    """What vLLM alone is tried with."""

    step_tokens: int
    compiled: bool

    def __str__(self) -> str:
        compiled = "compiled" if self.compiled else "not compiled"
        return f"{self.step_tokens:,} tokens a step, {compiled}"


class Alone:
    """vLLM by itself, in a process of its own, ready."""

    def __init__(self, claims_file: Path, settings: EngineSettings) -> None:
        command = [sys.executable, __file__, "--alone", str(claims_file)]
        log = claims_file.with_name("alone.log")
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [*command, "--engine-settings", json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )
        self.pid = self._process.pid
        if self._answer() != "ready":
            self._process.wait()
            raise SystemExit(f"vLLM alone did not start:\n{log.read_text()[-4_000:]}")

    def run(self, count: int) -> float:
        """Seconds for so many claims."""
        self._process.stdin.write(f"{count}\n")
        return float(self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        return self._process.stdout.readline().strip()


def serve_alone(claims_file: Path, settings: EngineSettings) -> None:
    """vLLM in this process: for each count on standard input, the seconds on output."""
    # In this very process, not in one that it starts and talks to. Everything else is vLLM's own.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Enough for all that runs at once. The half of the memory that vLLM takes by itself, and what
    # its start takes on top where it compiles, are more than 24 GiB.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "3"
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's own words go to standard error
    prompts, tokens = prompts_of(claims_file)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(MODEL),
        dtype="bfloat16",
        max_model_len=MAX_TOKENS,
        max_num_batched_tokens=settings.step_tokens,
        enforce_eager=not settings.compiled,
        enable_prefix_caching=False,
        generation_config="vllm",
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(tokens))
    ready = [{"prompt_token_ids": ids} for ids in prompts]
    llm.generate(ready[:8], parameters, use_tqdm=False)
    output.write("ready\n")
    for line in sys.stdin:
        count = int(line)
        started = time.monotonic()
        answers = llm.generate(ready[:count], parameters, use_tqdm=False)
        output.write(f"{time.monotonic() - started}\n")
        assert len(answers) == count


def fastest_alone(claims_file: Path) -> EngineSettings:
    """The settings with which vLLM alone is fastest here."""
    seconds = {}
    for settings in starmap(EngineSettings, product(STEP_TOKENS, (False, True))):
        alone = Alone(claims_file, settings)
        seconds[settings] = min(alone.run(TRIED_CLAIMS) for _ in range(2))
        alone.close()
        console.print(
            f"vLLM alone, {settings}: {TRIED_CLAIMS / seconds[settings]:.2f} claims/s",
            highlight=False,
        )
    return min(seconds, key=seconds.__getitem__)


def prompts_of(claims_file: Path) -> tuple[list[list[int]], Sequence[int]]:
    """The token ids that a worker would send, and the label tokens."""
    from services.contracts import ContextSpec, PromptSpec
    from services.models.compiled_prompt import CompiledPrompt
    from services.models.files import pin_model
    from services.models.tokenizer import ModelTokenizer
    from services.producer import ClaimsFile, Source

    spec = pin_model(ContextSpec(model=str(MODEL), max_model_tokens=MAX_TOKENS))
    compiled = CompiledPrompt(PromptSpec(), ModelTokenizer.load(spec))
    with Source.open(str(claims_file)) as source:
        claims = list(ClaimsFile(source, compiled.spec))
    return [list(ids) for ids in compiled.encode(claims)], compiled.label_tokens


def write_claims(path: Path, count: int) -> None:
    """So many claims, with ids of their own, from a real file where it is at hand."""
    source = SYMMETRIC if SYMMETRIC.exists() else SAMPLES
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            line = lines[number % len(lines)]
            claim = {"id": str(number), "claim": line["claim"], "evidence": line["evidence"]}
            file.write(json.dumps(claim) + "\n")


class Keepwarm:
    """A node, a warm worker and a collector; `run` sends the claims once more, as a new run."""

    def __init__(self, directory: Path, compiled: bool) -> None:
        from benchmarks.installation import Installation

        arguments = ["--no-enable-prefix-caching"]
        if compiled:
            arguments.append("--no-enforce-eager")
            os.environ["TORCHDYNAMO_DISABLE"] = "0"
        self._installation = Installation(directory, KEEPWARM_ENGINE_ARGUMENTS=" ".join(arguments))
        self._worker, _ = self._installation.ready_worker()

    def run(self, claims_file: Path, limit: int, name: str) -> float:
        """Seconds from the opening of the file to the last verdict in the store."""
        from services.contracts import ContextSpec, PromptSpec
        from services.models.files import pin_model

        context = pin_model(ContextSpec(model=str(MODEL), max_model_tokens=MAX_TOKENS))
        prompt = PromptSpec(name=name)
        started = time.monotonic()
        batch_size = self._installation.settings.batch_size
        self._installation.wait_for(
            self._installation.publish(claims_file, prompt, context, batch_size, limit)
        )
        return time.monotonic() - started

    @property
    def pids(self) -> list[int]:
        """Of the worker and of its engine."""
        from services.contexts.keeper_client import engines

        records = engines(self._installation.settings.runtime_dir)
        pids = [record.pid for record in records if record.pid is not None]
        return [self._worker.pid, *pids]

    def close(self) -> None:
        self._worker.terminate()
        self._worker.wait()
        self._installation.close()


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
    parser.add_argument("--claims", type=int, default=1024, help="the many of each round")
    parser.add_argument("--few", type=int, default=128, help="the few of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="Keepwarm's engine compiles, too")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine-settings", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")
    if given.alone:
        serve_alone(given.alone, EngineSettings(**given.engine_settings))
        return

    with tempfile.TemporaryDirectory(prefix="keepwarm-benchmark-") as name:
        claims_file = Path(name) / "claims.jsonl"
        write_claims(claims_file, given.claims)
        settings = fastest_alone(claims_file)
        keepwarm = Keepwarm(Path(name), given.compiled)
        try:
            rounds = measure(keepwarm, claims_file, settings, given.few, given.claims, given.rounds)
        finally:
            keepwarm.close()

    table = Table(title=f"{given.few:,} and {given.claims:,} claims; vLLM alone: {settings}")
    table.add_column("round", justify="right")
    for side in ("vLLM alone", "Keepwarm"):
        table.add_column(f"{side}, claims/s", justify="right")
        table.add_column("fixed, s", justify="right")
    table.add_column("ratio of the rates", justify="right")
    ratios = [through.claims_a_second / alone.claims_a_second for alone, through in rounds]
    for number, ((alone, through), ratio) in enumerate(zip(rounds, ratios, strict=True), 1):
        cells = (
            figure
            for side in (alone, through)
            for figure in (side.claims_a_second, side.fixed_seconds)
        )
        table.add_row(str(number), *(f"{cell:.2f}" for cell in cells), f"{ratio:.3f}")
    table.add_row("median", *[""] * 4, f"{statistics.median(ratios):.3f}")
    console.print(table)
    if given.json:
        figures = {
            "alone": asdict(settings),
            "keepwarm_compiled": given.compiled,
            "rounds": [
                {"alone": asdict(alone), "keepwarm": asdict(through)} for alone, through in rounds
            ],
            "ratio": statistics.median(ratios),
        }
        given.json.write_text(json.dumps(figures) + "\n", encoding="utf-8")


def measure(
    keepwarm: Keepwarm,
    claims_file: Path,
    settings: EngineSettings,
    few: int,
    many: int,
    rounds: int,
) -> list[tuple[Speed, Speed]]:
    """Of vLLM alone and of Keepwarm, in each round."""
    speeds = []
    alone = Alone(claims_file, settings)
    try:
        alone.run(few)  # warms it up; so does the next line
        keepwarm.run(claims_file, few, "warming up")
        for number in range(rounds):
            with suspended(keepwarm.pids):
                by_itself = Speed.of(few, alone.run(few), many, alone.run(many))
            with suspended([alone.pid]):
                through = Speed.of(
                    few,
                    keepwarm.run(claims_file, few, f"few {number}"),
                    many,
                    keepwarm.run(claims_file, many, f"many {number}"),
                )
            speeds.append((by_itself, through))
    finally:
        alone.close()
    return speeds


if __name__ == "__main__":
    main()
