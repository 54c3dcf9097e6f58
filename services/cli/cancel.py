"""`keepwarm cancel`."""

from typing import Annotated

import typer

from services.cli.options import StoreOption
from services.cli.printable import printable
from services.contracts import load_settings
from services.store import Store, find_run


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or its beginning.")],
    store: StoreOption = None,
) -> None:
    """Stop a run: workers discard its remaining claims. Stored verdicts are kept.

    The store records it at once, and the collector notifies all workers within seconds. Submit the
    file again to resume the run.
    """
    with Store.open(load_settings(store_url=store), create=False) as database:
        known = find_run(database, run)
        database.cancel(known.run_key)
    print(printable(f"{known.run_id} is cancelled; the collector notifies the workers"))
