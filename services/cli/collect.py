"""`keepwarm collect`."""

from typing import Annotated

import structlog
import typer

from services.cli.garbage import expect_many_small_objects
from services.cli.logs import configure_logs
from services.cli.options import BrokerOption, StoreOption
from services.cli.signals import on_stop_signal
from services.collector import Collector, Incoming, Store, run_status
from services.contracts import load_settings

log = structlog.get_logger(__name__)


def collect(
    broker: BrokerOption = None,
    store: StoreOption = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="End when this run is complete.", show_default=False),
    ] = None,
) -> None:
    """Move verdicts from the broker into the store, until told to stop."""
    expect_many_small_objects()
    settings = load_settings(broker_url=broker, store_url=store)
    configure_logs(settings)
    database = Store.open(settings)
    collector = Collector(database, settings)
    on_stop_signal(lambda _: collector.stop())

    def after_commit(incoming: Incoming) -> None:
        log.info("store.committed", claims=len(incoming), messages=len(incoming.verdicts))
        if until is not None:
            status = run_status(database, until)
            if status is not None and status.complete:
                collector.stop()

    try:
        status = None if until is None else run_status(database, until)
        if status is not None and status.complete:
            return
        collector.run(after_commit)
    finally:
        database.close()
