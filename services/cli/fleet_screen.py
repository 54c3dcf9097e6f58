"""The fleet on the screen: workers, contexts, queues. What they say is a stranger's text."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from services.cli.screen import add_numbers, duration, plain_table
from services.contracts import ContextDemand, WorkerHeartbeat

if TYPE_CHECKING:
    from services.cli.listening import Heard

_MOST_ROWS = 50
# Enough to tell contexts apart, and to find one in the table of contexts below.
_CONTEXT_CHARS = 12


def heard_tables(heard: "Heard") -> Group:
    """All that was heard, and in a line why it may not be all."""
    parts: list[Table | Text] = []
    if heard.queues is not None:
        parts += [_workers(heard.workers), _contexts(heard.contexts), _queues(heard.queues)]
    if heard.fault is not None:
        parts.append(Text(f"no workers are shown: {heard.fault}"))
    return Group(*(each for part in parts for each in (Text(), part)))


def _workers(workers: Sequence[WorkerHeartbeat]) -> Table:
    ordered = sorted(workers, key=lambda each: (each.context_id or "", each.worker_id))
    # A column for what somebody has, and differs: the table has to fit 80 columns.
    contexts = len({report.context_id for report in workers}) > 1
    jobs = any(report.job_id for report in workers)
    walltimes = any(report.walltime_left_seconds is not None for report in workers)
    table = plain_table()
    if not ordered:
        table.add_row("no worker is there")
        return table
    for name in ("worker", "device"):
        table.add_column(name, overflow="ellipsis")
    for name in ("state", *(["context"] if contexts else []), *(["job"] if jobs else [])):
        table.add_column(name, no_wrap=True)
    add_numbers(table, "claims/s", "in hand", *(["left"] if walltimes else []))
    for report in ordered[:_MOST_ROWS]:
        speed, left = report.claims_per_second, report.walltime_left_seconds
        table.add_row(
            report.worker_id,
            report.device,
            report.state,
            *([(report.context_id or "")[:_CONTEXT_CHARS]] if contexts else []),
            *([report.job_id or ""] if jobs else []),
            "" if speed is None else f"{speed:,.1f}",
            f"{report.claims_in_hand:,}",
            *(["" if left is None else duration(left)] if walltimes else []),
        )
    if len(ordered) > _MOST_ROWS:
        table.add_row(f"and {len(ordered) - _MOST_ROWS:,} more")
    return table


def _contexts(contexts: Sequence[ContextDemand]) -> Table:
    table = plain_table()
    if not contexts:
        table.add_row("no context is wanted")
        return table
    table.add_column("context", no_wrap=True)
    table.add_column("model", overflow="fold")
    add_numbers(table, "ready", "in flight", "workers")
    for line in contexts[:_MOST_ROWS]:
        table.add_row(
            line.context.context_id,
            PurePath(line.context.model).name,
            f"{line.claims_ready:,}",
            f"{line.claims_in_flight:,}",
            f"{line.workers_warm:,}",
        )
    return table


def _queues(queues: Mapping[str, int]) -> Text:
    listed = ", ".join(f"{name} {messages:,}" for name, messages in queues.items())
    return Text(f"messages waiting: {listed or 'the broker has no queue of ours yet'}")
