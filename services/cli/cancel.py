"""`keepwarm cancel`."""

from typing import Annotated

import typer

from services.cli.options import StoreOption
from services.cli.shown import shown
from services.contracts import load_settings
from services.store import Store, find_run


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run, or how its id begins.")],
    store: StoreOption = None,
) -> None:
    """Stop a run: workers drop its batches unanswered; verdicts that are there stay.

    The store says so at once. Workers hear of it from the collector within seconds, wherever they
    are. Submitting the run again makes it wanted again.
    """
    with Store.open(load_settings(store_url=store), create=False) as database:
        known = find_run(database, run)
        database.cancel(known.run_key)
    print(shown(f"{known.run_id} is cancelled; workers hear of it from the collector"))
