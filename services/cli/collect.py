"""`keepwarm collect`."""

import threading
import time
from collections.abc import Callable
from typing import Annotated

import structlog
import typer

from services.broker.policies import check_policies
from services.cli.logs import configure_logs
from services.cli.options import BrokerOption, StoreOption
from services.cli.process import expect_many_small_objects
from services.cli.stores import network_store_warning
from services.collector import Collector
from services.collector.collector import ContextStatus
from services.contracts import Settings, load_settings
from services.contracts.errors import RunIncomplete
from services.node.signals import on_stop_signal
from services.store import Incoming, RunStatus, Store, run_status
from services.store.inspection import require_writable
from services.telemetry import MetricsServer

_POLICY_SECONDS = 300.0
_CHECK_SECONDS = 2.0
# A warning is logged when a run gains no outcome for this long, then after twice as long each time.
_STALLED_SECONDS = 30.0
_MAX_STALLED_SECONDS = 3_600.0

log = structlog.get_logger(__name__)


def collect(
    broker: BrokerOption = None,
    store: StoreOption = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="End when this run (its complete id) is complete or cancelled.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Store verdicts from the broker, until stopped.

    It also sends claims that workers returned to other workers.
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

    watch = RunWatch(until)
    stopped = threading.Event()

    def status() -> RunStatus | None:
        return None if until is None else run_status(database, until)

    def ended() -> bool:
        now = status()
        if now is not None and (now.complete or now.cancelled or now.proven is False):
            return True
        watch.check(now, collector.context_status)
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
            f"{last.run_id} has outcomes of claims that are not in its file; submit the file "
            "again with this store to remove them and to send the missing claims"
        )
    if last is not None and last.cancelled and not last.complete:
        raise RunIncomplete(f"{last.run_id} was cancelled; submit the file again to resume it")


class RunWatch:
    """Logs new dead messages, and why a run makes no progress."""

    def __init__(self, run_id: str | None) -> None:
        self._run_id = run_id
        self._outcomes = -1
        self._dead_messages = 0
        self._due = 0.0
        self._changed_at = time.monotonic()
        self._stalled_seconds = _STALLED_SECONDS

    def check(
        self, status: RunStatus | None, context_status: Callable[[str | None], ContextStatus]
    ) -> None:
        """May be called at any rate; it checks every two seconds. `context_status` takes an id."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _CHECK_SECONDS
        where = context_status(None if status is None else status.context_id)
        if where.dead_messages > self._dead_messages:
            log.warning(
                "dead_messages",
                messages=where.dead_messages,
                next_step="`keepwarm dead list` shows the reason of each",
            )
        self._dead_messages = where.dead_messages
        outcomes = 0 if status is None else status.done + status.dead
        if outcomes != self._outcomes:
            self._outcomes, self._changed_at = outcomes, now
            self._stalled_seconds = _STALLED_SECONDS
        elif self._run_id is not None and now - self._changed_at >= self._stalled_seconds:
            self._stalled_seconds = min(2 * self._stalled_seconds, _MAX_STALLED_SECONDS)
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
                reason=stall_reason(status, where),
            )


def stall_reason(status: RunStatus | None, where: ContextStatus) -> str:
    """The most likely cause, and the next step."""
    if status is None or status.context_id is None:
        return (
            "the run is not announced: it was not submitted to this broker, or the broker dropped "
            "it (see `keepwarm dead list` and `keepwarm doctor`); submit its file"
        )
    if where.messages:
        if where.workers:
            return "claims are in their queue, and workers serve the context or load it"
        return f"no worker serves {status.context_id}; start one"
    if where.claims_held:
        return "claims are in flight at workers"
    if status.total is None:
        return "the submission is not complete; if the producer has ended, submit the file again"
    if where.dead_messages:
        return (
            "claims are in no queue and at no worker; some may be dead messages: `keepwarm dead "
            "list` lists them, `keepwarm dead retry` sends them again"
        )
    return (
        "claims are in no queue and at no worker: the broker lost or dropped them (`keepwarm "
        "doctor` checks for policies that drop messages). Submit the file again with this store "
        "to send the claims without an outcome"
    )


def watch_policies(settings: Settings, stop: threading.Event) -> None:
    """Log harmful broker policies, now and when they change, until `stop` is set.

    Raises UsageError when KEEPWARM_BROKER_MANAGEMENT_URL is invalid.
    """
    logged: set[str] = set()

    def check() -> None:
        policies = check_policies(settings)
        harms = {str(harm) for harm in policies.problems}
        for harm in sorted(harms - logged):
            log.warning("broker.policy", harm=harm)
        unknown = {policies.unknown} if policies.unknown else set()
        for reason in unknown - logged:
            log.info("broker.policies_unknown", reason=reason)
        logged.clear()
        logged.update(harms, unknown)

    def repeat() -> None:
        while not stop.wait(_POLICY_SECONDS):
            check()

    check()
    threading.Thread(target=repeat, name="policies", daemon=True).start()


def _log_commit(incoming: Incoming) -> None:
    log.info("store.committed", claims=len(incoming), messages=len(incoming.verdicts))
