"""`keepwarm collect`."""

from typing import Annotated

import structlog
import typer

from services.broker.policies import ask_policies
from services.cli.garbage import expect_many_small_objects
from services.cli.logs import configure_logs
from services.cli.network_store import network_store_warning
from services.cli.options import BrokerOption, StoreOption
from services.cli.signals import on_stop_signal
from services.collector import Collector, Incoming, RunStatus, Store, run_status
from services.contracts import Settings, load_settings
from services.contracts.errors import RunIncomplete
from services.telemetry import MetricsServer

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
    collector = Collector(database, settings)
    on_stop_signal(lambda _: collector.stop())

    def status() -> RunStatus | None:
        return None if until is None else run_status(database, until)

    def ended() -> bool:
        now = status()
        return now is not None and (now.complete or now.cancelled)

    try:
        with MetricsServer(settings) as metrics:
            if not ended():
                _log_policies(settings)
                metrics.serve(collector, {"/sd": collector.targets})
                collector.run(_log_commit, ended)
            last = status()
    finally:
        database.close()
    if last is not None and last.cancelled and not last.complete:
        raise RunIncomplete(f"{last.run_id} was cancelled; submitting it again goes on with it")


def _log_policies(settings: Settings) -> None:
    policies = ask_policies(settings)
    for harm in policies.harms:
        log.warning("broker.policy", harm=str(harm))
    if policies.unknown:
        log.info("broker.policies_unknown", reason=policies.unknown)


def _log_commit(incoming: Incoming) -> None:
    log.info("store.committed", claims=len(incoming), messages=len(incoming.verdicts))
