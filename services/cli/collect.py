"""`keepwarm collect`."""

import threading
import time
from collections.abc import Callable
from typing import Annotated

import structlog
import typer

from services.broker.policies import ask_policies
from services.cli.garbage import expect_many_small_objects
from services.cli.logs import configure_logs
from services.cli.options import BrokerOption, StoreOption
from services.collector import Collector
from services.collector.collector import ContextStatus
from services.contracts import Settings, load_settings
from services.contracts.errors import RunIncomplete
from services.doctor.network_store import network_store_warning
from services.node.signals import on_stop_signal
from services.store import Incoming, RunStatus, Store, run_status
from services.store.inspection import require_writable
from services.telemetry import MetricsServer

_POLICY_SECONDS = 300.0
_LOOK_SECONDS = 2.0
# A run that is waited for, and gains nothing: told after so long, then after twice as long again.
_SILENT_SECONDS = 30.0
_LONGEST_SILENT_SECONDS = 3_600.0

log = structlog.get_logger(__name__)


def collect(
    broker: BrokerOption = None,
    store: StoreOption = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="End when this run, by its whole id, is complete or cancelled.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Move verdicts from the broker into the store, until told to stop.

    It also puts the claims that workers give back before other workers again.
    """
    expect_many_small_objects()
    settings = load_settings(broker_url=broker, store_url=store)
    configure_logs(settings)
    if harm := network_store_warning(settings):
        log.warning("store.on_network", harm=harm)
    database = Store.open(settings)
    require_writable(database)
    collector = Collector(database, settings)
    on_stop_signal(lambda _: collector.stop())

    wait = Wait(until)
    stopped = threading.Event()

    def status() -> RunStatus | None:
        return None if until is None else run_status(database, until)

    def ended() -> bool:
        now = status()
        if now is not None and (now.complete or now.cancelled or now.proven is False):
            return True
        wait.look(now, collector.context_status)
        return False

    try:
        with MetricsServer(settings) as metrics:
            if not ended():
                watch_policies(settings, stopped)
                metrics.serve(collector, {"/sd": collector.targets})
                collector.run(_log_commit, ended)
            last = status()
    finally:
        stopped.set()
        database.close()
    if last is not None and last.proven is False:
        raise RunIncomplete(
            f"{last.run_id} has outcomes of claims that its file does not have; submitting the "
            "file again with this store removes them, and sends the missing ones"
        )
    if last is not None and last.cancelled and not last.complete:
        raise RunIncomplete(f"{last.run_id} was cancelled; submitting it again goes on with it")


class Wait:
    """What is told while verdicts are waited for: dead messages that there are, and why a run goes
    nowhere, as far as broker and workers show it.
    """

    def __init__(self, run_id: str | None) -> None:
        self._run_id = run_id
        self._outcomes = -1
        self._dead_messages = 0
        self._due = 0.0
        self._changed_at = time.monotonic()
        self._silent_seconds = _SILENT_SECONDS

    def look(
        self, status: RunStatus | None, context_status: Callable[[str | None], ContextStatus]
    ) -> None:
        """As often as one likes: it looks every two seconds. `whereabouts` of a context."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _LOOK_SECONDS
        where = context_status(None if status is None else status.context_id)
        if where.dead_messages > self._dead_messages:
            log.warning(
                "dead_messages",
                messages=where.dead_messages,
                says="`keepwarm dead list` shows why each could not be used or was given up",
            )
        self._dead_messages = where.dead_messages
        outcomes = 0 if status is None else status.done + status.dead
        if outcomes != self._outcomes:
            self._outcomes, self._changed_at = outcomes, now
            self._silent_seconds = _SILENT_SECONDS
        elif self._run_id is not None and now - self._changed_at >= self._silent_seconds:
            self._silent_seconds = min(2 * self._silent_seconds, _LONGEST_SILENT_SECONDS)
            self._changed_at = now
            log.warning(
                "run.waiting",
                run=self._run_id,
                outcomes=outcomes,
                claims=status and status.total,
                messages_waiting=where.messages,
                workers=where.workers,
                claims_held=where.claims_held,
                dead_messages=where.dead_messages,
                says=why_it_waits(status, where),
            )


def why_it_waits(status: RunStatus | None, where: ContextStatus) -> str:
    """The likeliest cause, and the next step."""
    if status is None or status.context_id is None:
        return (
            "no announcement of this run has come: it was not submitted to this broker, or the "
            "broker gave it up (`keepwarm dead list`, `keepwarm doctor`); submit its file"
        )
    if where.messages:
        if where.workers:
            return "its claims wait in their queue; workers serve its context or load it"
        return f"its claims wait for a worker of {status.context_id}; start one"
    if where.claims_held:
        return "workers have its claims"
    if status.total is None:
        return "it is not all submitted: the producer is still at it, or was ended; submit again"
    if where.dead_messages:
        return (
            "no queue and no worker has its claims; some may be in dead-messages: `keepwarm dead "
            "list` shows them, `keepwarm dead retry` sends them back"
        )
    return (
        "no queue and no worker has its claims: the broker lost them or dropped them (`keepwarm "
        "doctor` looks for policies that do); submit the file again with this store, and only "
        "claims without an outcome are sent"
    )


def watch_policies(settings: Settings, stop: threading.Event) -> None:
    """Log what policies do to our queues, now and as they change, until `stop` is set.

    Raises UsageError when KEEPWARM_BROKER_MANAGEMENT_URL is of no use.
    """
    told: set[str] = set()

    def look() -> None:
        policies = ask_policies(settings)
        harms = {str(harm) for harm in policies.problems}
        for harm in sorted(harms - told):
            log.warning("broker.policy", harm=harm)
        unknown = {policies.unknown} if policies.unknown else set()
        for reason in unknown - told:
            log.info("broker.policies_unknown", reason=reason)
        told.clear()
        told.update(harms, unknown)

    def go_on() -> None:
        while not stop.wait(_POLICY_SECONDS):
            look()

    look()
    threading.Thread(target=go_on, name="policies", daemon=True).start()


def _log_commit(incoming: Incoming) -> None:
    log.info("store.committed", claims=len(incoming), messages=len(incoming.verdicts))
