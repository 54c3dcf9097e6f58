"""Do the same claims get the same verdicts again? By dtype, and by how they come to the engine.

    .venv/bin/python benchmarks/repeatability.py

The sample claims through the real engine, in batches of several sizes, each size on an engine of
its own: once with nothing in its prefix cache, and once with all. An engine rounds by what it
computes in one step, and what that is depends on batches, on arrivals and on its cache. Prints for
each dtype how many labels and probabilities differ between any run and the first, and claims/s
without a cache. Takes about seven minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.installation import MODEL, Installation  # noqa: E402
from services.contexts.keeper_client import drain  # noqa: E402
from services.contracts import ContextSpec  # noqa: E402
from services.contracts.contexts import DType  # noqa: E402
from services.models.files import pin_model  # noqa: E402
from services.producer.prompt_file import read_prompt  # noqa: E402
from services.store import export_run, find_run  # noqa: E402

SAMPLES = REPOSITORY / "samples" / "claims.jsonl"
PROMPT = read_prompt(REPOSITORY / "samples" / "prompt.yaml")
Verdicts = Mapping[str, Mapping[str, Any]]
console = Console(width=110)
numbers = count(1)


def answered(
    installation: Installation, context: ContextSpec, batch_size: int
) -> tuple[float, Verdicts]:
    """Seconds and verdicts of a run of its own, which its prompt's name makes it."""
    prompt = PROMPT.model_copy(update={"name": f"{PROMPT.name} {next(numbers)}"})
    started = time.monotonic()
    run_id = installation.publish(SAMPLES, prompt, context, batch_size)
    installation.wait_for(run_id)
    seconds = time.monotonic() - started
    file = installation.directory / "verdicts.jsonl"
    export_run(installation.store, find_run(installation.store, run_id), "jsonl", file)
    with file.open(encoding="utf-8") as lines:
        return seconds, {row["claim_id"]: row for row in map(json.loads, lines)}


def differences(ours: Verdicts, others: Verdicts) -> dict[str, float]:
    assert ours.keys() == others.keys()
    pairs = [(ours[claim], others[claim]) for claim in ours]
    distances = [
        max(abs(a["probabilities"][label] - p) for label, p in b["probabilities"].items())
        for a, b in pairs
        if a["probabilities"] and b["probabilities"]  # an invalid verdict has none
    ]
    return {
        "labels": sum(a["label"] != b["label"] for a, b in pairs),
        "probabilities": sum(distance > 0 for distance in distances),
        "farthest": max(distances, default=0.0),
    }


def measure(installation: Installation, dtype: DType, sizes: list[int]) -> dict[str, Any]:
    context = pin_model(ContextSpec(model=str(MODEL), dtype=dtype))
    rates: list[float] = []
    runs: list[Verdicts] = []
    for size in sizes:
        worker, _ = installation.ready_worker("--dtype", dtype)
        try:
            seconds, first = answered(installation, context, size)
            runs += [first, answered(installation, context, size)[1]]
        finally:
            worker.terminate()
            worker.wait()
            drain(installation.settings)
        rates.append(len(first) / seconds)
        console.print(f"[dim]{dtype}, batches of {size}: {rates[-1]:.1f} claims/s …[/]")
    return {
        "claims": len(runs[0]),
        "right": [sum(row["label"] == row["gold"] for row in run.values()) for run in runs],
        "differences": [differences(runs[0], run) for run in runs[1:]],
        "claims_per_second": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--dtype", nargs="+", choices=get_args(DType), default=["bfloat16", "float32"]
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[32, 1, 8, 64])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")
    with (
        tempfile.TemporaryDirectory(prefix="kw-") as directory,
        closing(Installation(Path(directory))) as installation,
    ):
        figures = {
            dtype: measure(installation, dtype, arguments.batch_size) for dtype in arguments.dtype
        }

    table = Table(title=f"{SAMPLES.name}, batches of {arguments.batch_size}, each twice", box=None)
    for column in ("dtype", "claims", "right", "labels that differ", "probabilities that differ"):
        table.add_column(column, justify="right")
    table.add_column("by at most", justify="right")
    table.add_column("claims/s", justify="right")
    for dtype, found in figures.items():
        differ = found["differences"]
        table.add_row(
            *(dtype, str(found["claims"])),
            f"{min(found['right'])}-{max(found['right'])}",
            f"{min(d['labels'] for d in differ)}-{max(d['labels'] for d in differ)}",
            f"{min(d['probabilities'] for d in differ)}-{max(d['probabilities'] for d in differ)}",
            f"{max(d['farthest'] for d in differ):.6f}",
            f"{statistics.median(found['claims_per_second']):.1f}",
        )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
