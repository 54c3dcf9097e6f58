"""What a run takes on two workers of which one is slower, beside what it would take ideally.

    .venv/bin/python benchmarks/heterogeneous.py

Starts a RabbitMQ node of its own and the real commands; the engine is the tests' stand-in, which
takes a set time for each claim. First each worker is measured alone; the ideal is then claims /
(sum of both rates). Then both take part in runs with the horizon as it is, and with one so long
that it has no effect, in turns; workers begin each run anew, with nothing learned. Prints
makespan / ideal, from the opening of the file to the last verdict in the store.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.installation import MODEL, Installation  # noqa: E402
from services.contracts import ContextSpec, PromptSpec  # noqa: E402
from services.models.files import pin_model  # noqa: E402
from services.store import build_report, find_run  # noqa: E402
from tests.interpreters import interpreter  # noqa: E402

HORIZONS = {"paced": "4", "not paced": "604800"}
console = Console(width=110)


@contextmanager
def worker(
    installation: Installation, claim_seconds: float, prefetch_seconds: str
) -> Iterator[str]:
    """A worker that takes claims; its id."""
    process, line = installation.ready_worker(
        KEEPWARM_ENGINE_PYTHON=str(interpreter(installation.directory / "doubles")),
        KEEPWARM_LOG_FORMAT="json",
        KEEPWARM_PREFETCH_SECONDS=prefetch_seconds,
        VLLM_TEST_CLAIM_SECONDS=str(claim_seconds),
    )
    try:
        yield json.loads(line)["worker"]
    finally:
        process.terminate()
        process.wait()


def run(
    installation: Installation, count: int, batch_size: int, name: str
) -> tuple[float, dict[str, int]]:
    """Seconds from the opening of the file to the last verdict, and verdicts by worker."""
    file = installation.directory / "claims.jsonl"
    file.write_text("".join(f'{{"id": {n}, "claim": "Claim {n}."}}\n' for n in range(count)))
    context = pin_model(ContextSpec(model=str(MODEL)))
    started = time.monotonic()
    run_id = installation.publish(file, PromptSpec(name=name), context, batch_size)
    status = installation.wait_for(run_id)
    seconds = time.monotonic() - started
    assert status.lost_work == status.duplicates == status.dead == 0, status
    report = build_report(installation.store, find_run(installation.store, run_id))
    return seconds, {worker.worker_id: worker.verdicts for worker in report.workers}


def measure(arguments: argparse.Namespace, installation: Installation) -> dict[str, object]:
    """Rates alone, then every round: makespan / ideal and the slow worker's share."""
    rates = []
    for claim_seconds in (arguments.claim_seconds, arguments.claim_seconds * arguments.slower):
        count = round(arguments.ideal_seconds / 3 / claim_seconds)
        with worker(installation, claim_seconds, HORIZONS["paced"]):
            seconds, _ = run(installation, count, 64, f"alone {claim_seconds}")
        rates.append(count / seconds)
    fast, slow = rates
    claims = round(arguments.ideal_seconds * (fast + slow))
    ideal = claims / (fast + slow)
    console.print(
        f"alone: {fast:.1f} and {slow:.1f} claims/s; {claims:,} claims take {ideal:.1f} s ideally"
    )
    rounds = []
    for number in range(arguments.rounds):
        for batch_size in arguments.batch_size:
            for way, horizon in HORIZONS.items():
                with (
                    worker(
                        installation, arguments.claim_seconds * arguments.slower, horizon
                    ) as slow_one,
                    worker(installation, arguments.claim_seconds, horizon),
                ):
                    name = f"{way} {batch_size} {number}"
                    seconds, by_worker = run(installation, claims, batch_size, name)
                share = by_worker.get(slow_one, 0) / claims
                rounds.append((way, batch_size, seconds / ideal, share))
                console.print(f"{name}: {seconds / ideal:.3f}", highlight=False)
    return {"rates": rates, "claims": claims, "ideal_seconds": ideal, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--claim-seconds", type=float, default=0.01, help="of the faster engine")
    parser.add_argument("--slower", type=float, default=4.0, help="how many times the other is")
    parser.add_argument("--ideal-seconds", type=float, default=30.0, help="about so long a run")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make setup` first")

    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-benchmark-") as name,
        closing(Installation(Path(name))) as installation,
    ):
        figures = measure(arguments, installation)
    fast, slow = figures["rates"]
    table = Table(
        title=f"{figures['claims']:,} claims on workers of {fast:.0f} and {slow:.0f} claims/s; "
        f"the slow one's fair share is {slow / (fast + slow):.0%}",
        box=None,
    )
    for column in ("batches of", "", "makespan / ideal, median", "min", "max", "slow one's share"):
        table.add_column(column, justify="right")
    for batch_size in arguments.batch_size:
        for way in HORIZONS:
            found = [row for row in figures["rounds"] if row[:2] == (way, batch_size)]
            ratios = [row[2] for row in found]
            table.add_row(
                *(str(batch_size), way, f"{statistics.median(ratios):.3f}"),
                *(f"{min(ratios):.3f}", f"{max(ratios):.3f}"),
                f"{statistics.median(row[3] for row in found):.0%}",
            )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), **figures}, indent=2, default=str))


if __name__ == "__main__":
    main()
