"""Tables of workers, contexts and queues. Their texts come from outside and are not trusted."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from services.cli.screen import add_numbers, duration, plain_table
from services.contracts import ContextDemand, WorkerHeartbeat

if TYPE_CHECKING:
    from services.cli.broker_snapshot import BrokerSnapshot

_MAX_ROWS = 50
# Enough to distinguish contexts, and to find one in the table of contexts below.
_CONTEXT_CHARS = 12


def broker_tables(snapshot: "BrokerSnapshot") -> Group:
    """The tables of a snapshot, and its problem."""
    parts: list[Table | Text] = []
    if snapshot.queues is not None:
        parts += [
            _workers(snapshot.workers),
            _contexts(snapshot.contexts),
            _queues(snapshot.queues),
        ]
    if snapshot.problem is not None:
        parts.append(Text(f"no workers are shown: {snapshot.problem}"))
    return Group(*(each for part in parts for each in (Text(), part)))


def _workers(workers: Sequence[WorkerHeartbeat]) -> Table:
    ordered = sorted(workers, key=lambda each: (each.context_id or "", each.worker_id))
    # Optional columns only where they are used: the table must fit in 80 columns.
    contexts = len({worker.context_id for worker in workers}) > 1
    jobs = any(worker.job_id for worker in workers)
    walltimes = any(worker.walltime_left_seconds is not None for worker in workers)
    table = plain_table()
    if not ordered:
        table.add_row("no workers")
        return table
    for name in ("worker", "device"):
        table.add_column(name, overflow="ellipsis")
    for name in ("state", *(["context"] if contexts else []), *(["job"] if jobs else [])):
        table.add_column(name, no_wrap=True)
    add_numbers(table, "claims/s", "in flight", *(["left"] if walltimes else []))
    for worker in ordered[:_MAX_ROWS]:
        speed, left = worker.claims_per_second, worker.walltime_left_seconds
        table.add_row(
            worker.worker_id,
            worker.device,
            worker.state,
            *([(worker.context_id or "")[:_CONTEXT_CHARS]] if contexts else []),
            *([worker.job_id or ""] if jobs else []),
            "" if speed is None else f"{speed:,.1f}",
            f"{worker.claims_in_hand:,}",
            *(["" if left is None else duration(left)] if walltimes else []),
        )
    if len(ordered) > _MAX_ROWS:
        table.add_row(f"and {len(ordered) - _MAX_ROWS:,} more")
    return table


def _contexts(contexts: Sequence[ContextDemand]) -> Table:
    table = plain_table()
    if not contexts:
        table.add_row("no contexts")
        return table
    table.add_column("context", no_wrap=True)
    table.add_column("model", overflow="fold")
    add_numbers(table, "ready", "in flight", "workers")
    for entry in contexts[:_MAX_ROWS]:
        table.add_row(
            entry.context.context_id,
            PurePath(entry.context.model).name,
            f"{entry.claims_ready:,}",
            f"{entry.claims_in_flight:,}",
            f"{entry.workers_warm:,}",
        )
    return table


def _queues(queues: Mapping[str, int]) -> Text:
    listed = ", ".join(f"{name} {messages:,}" for name, messages in queues.items())
    return Text(f"messages: {listed or 'the broker has no queues of Keepwarm yet'}")
