"""Tables, progress and the report, printed with rich.

Ids, labels, claims and engine logs come from outside. All printed text must pass through
`printable`: a `Screen` does that, and so must each caller of `print`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from services.cli.printable import printable
from services.contracts import INVALID

if TYPE_CHECKING:  # a machine that only submits has no store
    from services.store import Report, RunStatus
    from services.store.startups import Startups

_UNBOUNDED_WIDTH = 10_000
_MAX_LISTED = 5


class Screen(Console):
    """A console that prints text unchanged (no markup, no emoji codes), if it is `printable`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


@contextmanager
def line_progress(console: Screen, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar, or a count when the total is unknown. Yields the function that updates it."""
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


def plural(count: int, noun: str) -> str:
    """`1 claim`, `1,200 claims`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """A duration as text: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show(console: Screen, what: RenderableType) -> None:
    """Print a renderable. If the output is not a terminal, lines are neither wrapped nor padded."""
    if console.is_terminal:
        console.print(what)
        return
    options = console.options.update(width=_UNBOUNDED_WIDTH)
    for line in console.render_lines(what, options, pad=False):
        console.file.write("".join(segment.text for segment in line).rstrip() + "\n")
    console.file.flush()


def say(console: Screen, text: str) -> None:
    """Print text without wrapping it."""
    console.print(text, soft_wrap=True)


def plain_table(title: str | None = None) -> Table:
    """A table without rules, for columns of text and numbers."""
    return Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)


def add_numbers(table: Table, *names: str) -> None:
    """Columns of numbers. They are never cut; text columns shrink on a narrow terminal."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def status_table(runs: "Sequence[RunStatus]") -> Table:
    """One row for each run, within 80 columns. The column of failed claims is optional."""
    table = plain_table()
    if not runs:
        table.add_row("no runs in this store yet")
        return table
    failed = any(run.dead for run in runs)
    table.add_column("run", no_wrap=True)
    table.add_column("file", overflow="ellipsis")
    add_numbers(table, "done", "of", *(["failed"] if failed else []), "claims/s", "left")
    for run in runs:
        name = PurePath(run.source).name if run.source else "not announced"
        table.add_row(
            run.run_id,
            Text(name, no_wrap=True),  # the column may shrink, so it is not no_wrap itself
            f"{run.done:,}",
            _or_unknown(run.total),
            *([f"{run.dead:,}"] if failed else []),
            f"{run.claims_per_second:,.1f}",
            _left(run),
        )
    return table


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _left(run: "RunStatus") -> str:
    if run.complete:
        return "complete" if run.proven else "complete, unproven"
    if run.proven is False:
        return "wrong claims"
    if run.nowhere_since is not None and not run.cancelled:
        return "claims missing"
    return "cancelled" if run.cancelled else duration(run.eta_seconds)


def print_report(console: Screen, report: "Report", *, full: bool = False) -> None:
    """The result and its problems; with `full` the confusion matrix, workers and startups, too."""
    status = report.status
    source = PurePath(status.source).name if status.source else "a file not announced yet"
    show(console, Text(f"{source}, {status.run_id}", style="bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (*_result(report), *(_details(report) if full else ())):
        facts.add_row(name, Text(value))
    show(console, facts)
    if not full:
        show(console, Text(f"more: keepwarm report {status.run_id} --full", style="dim"))
        return
    if report.quality is not None:
        show(console, _confusion_table(report))
    if report.workers:
        show(console, _workers_table(report))
    if report.startups is not None and report.startups.cold:
        show(console, _cold_starts_table(report.startups))


def _result(report: "Report") -> Iterator[tuple[str, str]]:
    """The rows of the short report."""
    status, quality, speed = report.status, report.quality, report.speed
    if quality is not None:
        low, high = quality.accuracy_interval
        yield (
            "accuracy",
            f"{quality.accuracy:.3f} ({quality.correct:,} of {quality.labelled:,} correct; "
            f"95 % interval {low:.3f} to {high:.3f})",
        )
        yield "macro-F1", f"{quality.macro_f1:.3f}"
    shown = {label: n for label, n in report.verdicts.items() if n or label != INVALID}
    yield "verdicts", ", ".join(f"{label} {n:,}" for label, n in shown.items())
    yield "claims", _claims_line(status)
    yield from (("problem", problem) for problem in _problems(report))
    if speed is not None:
        yield (
            "speed",
            f"{speed.claims_per_second:,.1f} claims/s over {duration(speed.wall_seconds)}",
        )
    yield "model", status.model or "not known yet"
    if report.run is not None and report.run.context.adapter is not None:
        yield "adapter", report.run.context.adapter
    yield "prompt", status.prompt or "not known yet"


def _problems(report: "Report") -> Iterator[str]:
    status = report.status
    if report.dead:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in report.dead.items())
        failed = plural(status.dead, "claim")
        yield f"{failed} failed: {reasons}; see keepwarm dead list {status.run_id}"
    if invalid := report.verdicts.get(INVALID):
        what = plural(invalid, "INVALID verdict")
        yield f"{what}: the model gave the labels too little probability"
    found = report.input or {}
    if status.rejected:
        yield f"{plural(status.rejected, 'line')} rejected{_listed(found.get('rejected'))}"
    if without := found.get("without_evidence"):
        yield f"{plural(sum(without.values()), 'claim')} had no evidence{_listed(without)}"
    if unknown := found.get("unknown_labels"):
        yield (
            f"{plural(sum(unknown.values()), 'claim')} left out of the scores, because the prompt "
            f"does not have their labels{_listed(unknown)}"
        )
    if status.proven is False:
        yield "some outcomes belong to claims that are not in the file; see keepwarm status"
    if status.complete and status.proven is None:
        yield (
            "complete by its counts only: an older Keepwarm sent the run without the digest that "
            "proves it"
        )
    if status.cancelled and not status.complete:
        yield "the run was cancelled"


def _listed(counts: Mapping[str, int] | None) -> str:
    """Counts by name, the largest first."""
    ordered = Counter(counts or {}).most_common()
    listed = ", ".join(f"{what} {count:,}" for what, count in ordered[:_MAX_LISTED])
    more = ", …" if len(ordered) > _MAX_LISTED else ""
    return f": {listed}{more}" if listed else ""


def _claims_line(status: "RunStatus") -> str:
    if status.total is None:
        return f"{status.done:,} done; not all of the file is sent yet"
    left = status.total - status.done - status.dead
    repeated = f"; {status.repeated:,} repeated lines left out" if status.repeated else ""
    return (
        f"{status.done:,} of {status.total:,} have a verdict"
        f"{f', {left:,} are not done yet' if left > 0 else ''}{repeated}"
    )


def _details(report: "Report") -> Iterator[tuple[str, str]]:
    status, startups = report.status, report.startups
    if report.lines is not None:
        yield (
            "lines",
            f"{report.lines:,}: {_or_unknown(status.total)} claims, {status.repeated or 0:,} "
            f"repeated, {status.rejected or 0:,} rejected",
        )
    if report.mean_mass is not None:
        yield "label words", f"{report.mean_mass:.1%} of the probability (mean)"
    if report.speed is not None:
        yield "tokens", f"{report.speed.tokens_per_second:,.0f} prompt tokens/s"
        if report.speed.reasoning_tokens:
            yield "reasoning", f"{report.speed.reasoning_tokens:,} tokens, before the answers"
    yield (
        "delivered twice",
        f"{status.duplicates:,} verdicts (the first one counts), "
        f"{report.redelivered_batches:,} batches",
    )
    yield (
        "preemption",
        f"returned by preempted workers: {status.returned:,}; recomputed: at most "
        f"{status.lost_work:,}",
    )
    if startups is not None and startups.warm is not None:
        yield (
            "warm starts",
            f"{startups.warm.count:,} workers found the model loaded, in "
            f"{startups.warm.median_seconds:.2g} s (median)",
        )
    if startups is not None and startups.joined is not None:
        yield (
            "joined starts",
            f"{startups.joined.count:,} workers joined a start in progress, "
            f"{startups.joined.median_seconds:.2g} s (median)",
        )


def _confusion_table(report: "Report") -> Table:
    assert report.quality is not None
    table = plain_table("\ngold (rows) and verdict (columns)")
    table.add_column("")
    rows = report.quality.confusion
    for name in next(iter(rows.values())):
        table.add_column(name, justify="right")
    for gold, counts in rows.items():
        table.add_row(Text(gold), *(f"{count:,}" for count in counts.values()))
    return table


def _workers_table(report: "Report") -> Table:
    table = plain_table("\nworkers")
    for name in ("worker", "device"):
        table.add_column(name, overflow="fold")
    add_numbers(table, "verdicts", "duplicates", "tokens", "engine s")
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
    """One column for each measured phase: its mean in seconds."""
    table = plain_table("\ncold starts, in seconds")
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
