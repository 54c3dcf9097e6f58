"""What a person sees: tables, progress and the report, drawn by rich."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # a machine that only submits, or only reports, has not both
    from services.collector import Report, RunStatus
    from services.collector.startups import Startups


@contextmanager
def line_progress(
    console: Console, what: str, total: int | None
) -> Iterator[Callable[[int], None]]:
    """A bar (or a count, when the total is unknown) that is moved by calling what is yielded."""
    progress = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("lines"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def duration(seconds: float | None) -> str:
    """A time span for people: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def status_table(runs: "Sequence[RunStatus]") -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("source", overflow="fold", max_width=32)
    for name in ("total", "done", "dead", "rejected", "claims/s", "workers", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.run_id,
            Text(run.source or "not announced"),
            "?" if run.total is None else f"{run.total:,}",
            f"{run.done:,}",
            f"{run.dead:,}",
            "?" if run.rejected is None else f"{run.rejected:,}",
            f"{run.claims_per_second:,.1f}",
            str(run.workers_seen),
            _left(run),
        )
    if not runs:
        table.add_row("no run is in this store yet")
    return table


def _left(run: "RunStatus") -> str:
    if run.complete:
        return "complete"
    return "cancelled" if run.cancelled else duration(run.eta_seconds)


def print_report(console: Console, report: "Report") -> None:
    """The report as a few small tables."""
    status = report.status
    console.print(f"[bold]{status.run_id}[/bold]  {escape(status.source or '')}", highlight=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", Text(status.model or "?"))
    facts.add_row("prompt", Text(status.prompt or "?"))
    facts.add_row("claims", _claims_line(report))
    facts.add_row("verdicts", ", ".join(f"{k} {v:,}" for k, v in report.verdicts.items()))
    if report.mean_mass is not None:
        facts.add_row("label words", f"{report.mean_mass:.1%} of the probability (mean)")
    if report.dead:
        facts.add_row("dead", ", ".join(f"{k} {v:,}" for k, v in report.dead.items()))
    if report.quality is not None:
        quality = report.quality
        low, high = quality.accuracy_interval
        facts.add_row(
            "accuracy",
            f"{quality.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}; "
            f"{quality.correct:,} of {quality.labelled:,})",
        )
        facts.add_row("macro-F1", f"{quality.macro_f1:.3f}")
    if report.speed is not None:
        speed = report.speed
        facts.add_row(
            "speed",
            f"{speed.claims_per_second:,.1f} claims/s, {speed.tokens_per_second:,.0f} prompt "
            f"tokens/s over {duration(speed.wall_seconds)}",
        )
    facts.add_row(
        "duplicates",
        f"{status.duplicates:,} verdicts came twice and were ignored; "
        f"{report.redelivered_batches:,} batches were delivered again",
    )
    facts.add_row(
        "preemption",
        f"{status.returned:,} claims were returned unfinished; at most {status.lost_work:,} were "
        "computed again",
    )
    if report.startups is not None and report.startups.warm is not None:
        warm = report.startups.warm
        facts.add_row(
            "warm starts",
            f"{warm.count:,} workers found the model warm, after {warm.median_seconds:.2g} s "
            "(median)",
        )
    if report.startups is not None and report.startups.joined is not None:
        joined = report.startups.joined
        facts.add_row(
            "joined starts",
            f"{joined.count:,} workers waited for another's start, or for a wake, for "
            f"{joined.median_seconds:.2g} s (median)",
        )
    console.print(facts, highlight=False)
    if report.quality is not None:
        console.print(_confusion_table(report), highlight=False)
    if report.workers:
        console.print(_workers_table(report), highlight=False)
    if report.startups is not None and report.startups.cold:
        console.print(_cold_starts_table(report.startups), highlight=False)


def _claims_line(report: "Report") -> str:
    status = report.status
    if status.total is None or report.lines is None:
        return f"{status.done:,} done; the producer has not sent all of them yet"
    return (
        f"{status.total:,} of {report.lines:,} lines ({status.repeated or 0:,} repeated, "
        f"{status.rejected or 0:,} rejected); {status.done:,} verdicts, {status.dead:,} dead"
    )


def _confusion_table(report: "Report") -> Table:
    assert report.quality is not None
    table = Table(title="gold (rows) and verdict (columns)", title_justify="left", box=None)
    table.add_column("")
    rows = report.quality.confusion
    for name in next(iter(rows.values())):
        table.add_column(name, justify="right")
    for gold, counts in rows.items():
        table.add_row(Text(gold), *(f"{count:,}" for count in counts.values()))
    return table


def _workers_table(report: "Report") -> Table:
    table = Table(title="workers", title_justify="left", box=None)
    for name in ("worker", "device"):
        table.add_column(name, overflow="fold")
    for name in ("verdicts", "duplicates", "tokens", "engine s"):
        table.add_column(name, justify="right")
    for share in report.workers:
        table.add_row(
            Text(share.worker_id),
            Text(share.device),
            f"{share.verdicts:,}",
            f"{share.duplicates:,}",
            f"{share.prompt_tokens:,}",
            f"{share.engine_seconds:,.1f}",
        )
    return table


def _cold_starts_table(startups: "Startups") -> Table:
    """A column for each phase that somebody measured: the mean seconds of those who did."""
    table = Table(title="cold starts, in seconds", title_justify="left", box=None)
    table.add_column("device", overflow="fold")
    measured = [
        name
        for name in type(startups.cold[0].phases).model_fields
        if any(getattr(cold.phases, name) is not None for cold in startups.cold)
    ]
    for name in ("starts", "median", "longest", *(name.replace("_", " ") for name in measured)):
        table.add_column(name, justify="right")
    for cold in startups.cold:
        means = (getattr(cold.phases, name) for name in measured)
        table.add_row(
            Text(cold.device),
            f"{cold.count:,}",
            f"{cold.median_seconds:,.1f}",
            f"{cold.longest_seconds:,.1f}",
            *("" if mean is None else f"{mean:,.1f}" for mean in means),
        )
    return table
