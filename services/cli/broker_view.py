"""Workers, contexts and queues at the broker, for `status --watch`: received from the messages that
all services receive, and shown as tables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from rich.console import Group
from rich.table import Table
from rich.text import Text

from services.broker import BrokerAddress, Consumer, Counts
from services.cli.screen import add_numbers, duration, plain_table
from services.collector.fleet import Fleet
from services.contracts import (
    ContextDemand,
    ControlUpdate,
    Settings,
    WorkerHeartbeat,
    decode,
    topology,
)
from services.contracts.errors import BrokerError, MessageInvalid, MessageTooNew, UsageError
from services.contracts.heartbeats import unique_process_name

_CONNECT_SECONDS = 5.0
_MAX_ROWS = 50
# Enough to distinguish contexts, and to find one in the table of contexts below.
_CONTEXT_CHARS = 12


@dataclass(frozen=True)
class BrokerSnapshot:
    """The state at the broker. `problem`: a line about why it may be incomplete."""

    workers: Sequence[WorkerHeartbeat] = ()
    contexts: Sequence[ContextDemand] = ()
    queues: Counts | None = None
    problem: str | None = None


class BrokerListener:
    """Receives heartbeats and control updates. It consumes no message of another service."""

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError when no broker is set."""
        self._address = BrokerAddress.from_settings(settings)
        self._timeout_seconds = min(_CONNECT_SECONDS, settings.broker_connect_timeout_seconds)
        self._fleet = Fleet()
        self._control = ControlUpdate()
        self._counts: Counts | None = None
        self._links: list[Consumer] = []

    @contextmanager
    def listening(self) -> Iterator["BrokerListener"]:
        """Raises BrokerError when the broker cannot be reached, or refuses the user."""
        with ExitStack() as opened:
            for name, exchange, receive in (
                ("presence", topology.HEARTBEATS_EXCHANGE, self.receive_heartbeat),
                ("notices", topology.CONTROL_EXCHANGE, self.receive_control_update),
            ):
                link = Consumer(
                    self._address,
                    f"status-{name}",
                    queues=(),
                    prefetch=1,
                    on_fanout_message=receive,
                    listener=unique_process_name(),
                    fanout_exchange=exchange,
                )
                self._links.append(opened.enter_context(link.open(self._timeout_seconds)))
            yield self

    def snapshot(self) -> BrokerSnapshot:
        """The latest state; never waits. Queue lengths are those of the snapshot before."""
        problem = next(filter(None, (link.readiness_error for link in self._links)), None)
        if problem is not None:
            self._fleet.note_disconnected()
        self._links[0].request_counts(topology.CORE_QUEUES, self.receive_counts)
        return BrokerSnapshot(self._fleet.workers(), self._control.contexts, self._counts, problem)

    # Called on the links' threads. Messages that are not Keepwarm's are ignored.

    def receive_heartbeat(self, body: bytes) -> None:
        try:
            self._fleet.note(decode(WorkerHeartbeat, body))
        except (MessageInvalid, MessageTooNew):
            return

    def receive_control_update(self, body: bytes) -> None:
        try:
            self._control = decode(ControlUpdate, body)
        except (MessageInvalid, MessageTooNew):
            return

    def receive_counts(self, counts: Counts) -> None:
        self._counts = counts


@contextmanager
def open_broker_view(settings: Settings) -> Iterator[Callable[[], BrokerSnapshot]]:
    """A function that returns the latest snapshot; without a broker, a snapshot of the problem."""
    with ExitStack() as resources:
        try:
            snapshot: Callable[[], BrokerSnapshot] = resources.enter_context(
                BrokerListener(settings).listening()
            ).snapshot
        except (BrokerError, UsageError) as error:
            snapshot = partial(BrokerSnapshot, problem=str(error))
        yield snapshot


def broker_tables(snapshot: BrokerSnapshot) -> Group:
    """The tables of a snapshot, and its problem. Their texts come from outside: not trusted."""
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
