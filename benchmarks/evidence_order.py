"""What it gains that claims which share evidence travel together.

    .venv/bin/python benchmarks/evidence_order.py [--sentences 8]

The real engine, warm, with prefix caching; the same claims in three orders that take turns: as in
the file, shuffled, and shuffled but ordered by the producer. Shuffled is the worst case: a file may
keep claims that share evidence near each other by itself. Each repetition's prompts begin with
words of their own, so that nothing cached before can help; the engine's cache is kept far smaller
than all prompts together, as it is where a run is large. Prints claims/s, their ratio to shuffled
within a round, and how much of the prompts the engine found in its cache, by its own count.

FEVER Symmetric has one sentence of evidence, mostly for two claims. With `--sentences 8` each is
followed by seven others of the file, drawn at random: so long is a passage that was retrieved.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import httpx
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.contexts.engine_command import CPU_BLOCK_TOKENS  # noqa: E402
from services.contexts.keeper_client import drain  # noqa: E402
from services.contexts.lease import EngineLease  # noqa: E402
from services.contexts.plan import EnginePlan  # noqa: E402
from services.contracts import Claim, ContextSpec, PromptSpec, load_settings  # noqa: E402
from services.models.compiled_prompt import CompiledPrompt  # noqa: E402
from services.models.files import pin_model  # noqa: E402
from services.models.tokenizer import ModelTokenizer  # noqa: E402
from services.node.device import find_device  # noqa: E402
from services.producer import ClaimsFile, Source  # noqa: E402
from services.producer.ordering import group_by_evidence  # noqa: E402

MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
SYMMETRIC = REPOSITORY.parent / "shared" / "data" / "fever_symmetric_dev.jsonl"
SAMPLES = REPOSITORY / "samples" / "claims.jsonl"
BATCH_SIZE, IN_FLIGHT = 64, 3
# vLLM caches whole blocks only; these are what Keepwarm's engines have.
BLOCK_TOKENS = {"cuda": 16, "cpu": CPU_BLOCK_TOKENS}
console = Console(width=120)

Score = Callable[[Sequence[Sequence[int]], Sequence[int]], int]
"""Puts a batch of prompts to the engine; how many answers came."""


@contextmanager
def warm_engine(spec: ContextSpec, cache_tokens: int) -> Iterator[tuple[Score, httpx.Client]]:
    """A real engine with a cache of so many tokens, and a client for its counters."""
    device = find_device()
    block = BLOCK_TOKENS[device.kind]
    arguments = f"--block-size {block} --num-gpu-blocks-override {cache_tokens // block}"
    with tempfile.TemporaryDirectory(prefix="kw-") as directory:
        settings = load_settings(runtime_dir=directory, engine_arguments=arguments)
        engine = EngineLease(EnginePlan.of(spec, device, settings), settings)
        try:
            engine.start(threading.Event())
            (uds,) = Path(directory).glob("ctx-*.sock")
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds))) as http:
                yield lambda prompts, tokens: len(list(engine.client.score(prompts, tokens))), http
        finally:
            engine.close()
            drain(settings)


def counted(http: httpx.Client) -> tuple[float, float]:
    """Tokens that the engine looked for in its prefix cache since it began, and that it found."""
    found = {"queries": 0.0, "hits": 0.0}
    for line in http.get("http://engine/metrics").text.splitlines():
        for name in found:
            if line.startswith(f"vllm:prefix_cache_{name}_total"):
                found[name] += float(line.rsplit(" ", 1)[1])
    return found["queries"], found["hits"]


def read_claims(file: Path, limit: int, sentences: int, chance: Random) -> list[Claim]:
    """About `limit` claims in the file's order: all that there are for evidence drawn at random."""
    with Source.open(str(file)) as source:
        claims = list(ClaimsFile(source, PromptSpec()))
    evidence = sorted({claim.evidence for claim in claims if claim.evidence})
    drawn = chance.sample(evidence, min(len(evidence), limit * len(evidence) // len(claims)))
    passages = {one: " ".join([one, *chance.sample(evidence, sentences - 1)]) for one in drawn}
    return [
        claim.model_copy(update={"evidence": passages[claim.evidence]})
        for claim in claims
        if claim.evidence in passages
    ]


def seconds_for(score: Score, compiled: CompiledPrompt, claims: Sequence[Claim]) -> float:
    """Through the engine as a worker puts them there: in batches, several at once."""
    prompts = compiled.encode(claims)
    batches = [prompts[n : n + BATCH_SIZE] for n in range(0, len(prompts), BATCH_SIZE)]
    started = time.monotonic()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = sum(pool.map(lambda batch: score(batch, compiled.label_tokens), batches))
    assert answers == len(claims)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--claims", type=int, default=708)
    parser.add_argument("--sentences", type=int, default=1, help="of evidence for each claim")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cache-tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")
    file = SYMMETRIC if SYMMETRIC.exists() else SAMPLES
    chance = Random(0)
    claims = read_claims(file, arguments.claims, arguments.sentences, chance)
    spec = pin_model(ContextSpec(model=str(MODEL)))
    tokenizer = ModelTokenizer.load(spec)

    rounds: list[dict[str, tuple[float, float, float]]] = []
    with warm_engine(spec, arguments.cache_tokens) as (score, http):
        for number in range(arguments.rounds + 1):
            shuffled = chance.sample(claims, len(claims))
            orders = {
                "shuffled": shuffled,
                "ordered": list(group_by_evidence(shuffled)),
                "as is": claims,
            }
            found = {}
            for name in chance.sample(list(orders), len(orders)):
                # In front of all else, and of the same length whatever the round.
                prompt = PromptSpec(instructions=f"{name} {number:03d} {PromptSpec().instructions}")
                compiled = CompiledPrompt(prompt, tokenizer)
                queries, hits = counted(http)
                seconds = seconds_for(score, compiled, orders[name])
                asked, had = counted(http)
                looked, hit = asked - queries, had - hits
                found[name] = (len(claims) / seconds, hit / looked, (looked - hit) / len(claims))
            if number:  # the first round warms up
                rounds.append(found)
            rates = ", ".join(f"{name} {rate:.1f}" for name, (rate, _, _) in sorted(found.items()))
            console.print(f"round {number}: {rates} claims/s", highlight=False)

    evidence = {claim.evidence for claim in claims}
    table = Table(
        title=f"{len(claims)} claims of {file.name}, {len(evidence)} evidence texts of "
        f"{arguments.sentences} sentences; {arguments.rounds} rounds, {os.cpu_count()} cores",
        box=None,
    )
    for column in ("order", "claims/s", "ratio to shuffled: min", "median", "max"):
        table.add_column(column, justify="right")
    table.add_column("cached", justify="right")
    table.add_column("tokens computed a claim", justify="right")
    for name in ("shuffled", "as is", "ordered"):
        ratios = [found[name][0] / found["shuffled"][0] for found in rounds]
        table.add_row(
            *(name, f"{statistics.median(found[name][0] for found in rounds):.2f}"),
            *(f"{min(ratios):.3f}", f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}"),
            f"{statistics.median(found[name][1] for found in rounds):.1%}",
            f"{statistics.median(found[name][2] for found in rounds):.0f}",
        )
    console.print(table)
    if arguments.json:
        figures = {**vars(arguments), "json": None, "rounds": rounds}
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
