"""Workers, contexts and queues at the broker, from the messages that all services receive."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from services.broker import BrokerAddress, Consumer, Counts
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
