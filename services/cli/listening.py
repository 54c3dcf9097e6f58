"""What goes on at the broker, heard where workers and collectors speak to everybody."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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
from services.contracts.heartbeats import own_name

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Heard:
    """As things stand at the broker. `fault` is why it may not be all, in a line."""

    workers: Sequence[WorkerHeartbeat] = ()
    contexts: Sequence[ContextDemand] = ()
    queues: Counts | None = None
    fault: str | None = None


class Listener:
    """Hears reports and notices. It takes nothing from a queue that others read."""

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError where no broker is named."""
        self._address = BrokerAddress.from_settings(settings)
        self._timeout_seconds = min(_CONNECT_SECONDS, settings.broker_connect_timeout_seconds)
        self._fleet = Fleet()
        self._notice = ControlUpdate()
        self._counts: Counts | None = None
        self._links: list[Consumer] = []

    @contextmanager
    def listening(self) -> Iterator["Listener"]:
        """Raises BrokerError where the broker is not there, or refuses us."""
        with ExitStack() as opened:
            for what, exchange, hear in (
                ("presence", topology.PRESENCE_EXCHANGE, self.hear_report),
                ("notices", topology.NOTICES_EXCHANGE, self.hear_notice),
            ):
                link = Consumer(
                    self._address,
                    f"status-{what}",
                    queues=(),
                    prefetch=1,
                    on_fanout_message=hear,
                    listener=own_name(),
                    fanout_exchange=exchange,
                )
                self._links.append(opened.enter_context(link.open(self._timeout_seconds)))
            yield self

    def look(self) -> Heard:
        """What was heard lately; never waits. Queues are as they were at the look before."""
        fault = next(filter(None, (link.readiness_error for link in self._links)), None)
        if fault is not None:
            self._fleet.note_disconnected()
        self._links[0].request_counts(topology.CORE_QUEUES, self.hear_counts)
        return Heard(self._fleet.workers(), self._notice.contexts, self._counts, fault)

    # On the links' threads. What is no message of ours is no reason to stop looking.

    def hear_report(self, body: bytes) -> None:
        try:
            self._fleet.note(decode(WorkerHeartbeat, body))
        except (MessageInvalid, MessageTooNew):
            return

    def hear_notice(self, body: bytes) -> None:
        try:
            self._notice = decode(ControlUpdate, body)
        except (MessageInvalid, MessageTooNew):
            return

    def hear_counts(self, counts: Counts) -> None:
        self._counts = counts


@contextmanager
def broker_heard(settings: Settings) -> Iterator[Listener | Heard]:
    """A listener; or, where there can be none, why, as something to show."""
    with ExitStack() as held:
        try:
            listener: Listener | Heard = held.enter_context(Listener(settings).listening())
        except (BrokerError, UsageError) as error:
            listener = Heard(fault=str(error))
        yield listener
