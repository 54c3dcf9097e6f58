"""The leaderboard of a sweep: its cells by accuracy."""

from collections.abc import Callable, Collection, Iterator, Sequence

from pydantic import BaseModel, ConfigDict
from rich.text import Text

from services.cli.cells import Cell
from services.cli.screen import Screen, add_numbers, plain_table, show
from services.contracts.errors import StoreError
from services.store import Quality, Store, find_run, quality_of, run_status


class LeaderboardRow(BaseModel):
    """A cell. With a selection, its place is by `selected`, and `quality` is that of the other
    claims; without one `selected` is None. `quality` is None without a verdict on a claim that has
    a gold label.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    prompt: str
    model: str
    run_id: str
    context_id: str
    directory: str
    """Of the cell's files, in that of the sweep."""
    claims: int | None
    """None if the run was not announced."""
    done: int
    dead: int
    complete: bool
    error: str | None
    """Why it is not complete, or what is wrong with it."""
    selected: Quality | None
    quality: Quality | None

    @property
    def accuracy(self) -> float:
        """That which decides its place; -1 if it has none."""
        deciding = self.selected or self.quality
        return -1.0 if deciding is None else deciding.accuracy


def leaderboard(
    store: Store,
    cells: Sequence[Cell],
    errors: dict[str, str],
    selection: Collection[str] | None,
) -> list[LeaderboardRow]:
    """The cells, the best one first. `errors` by run id. `selection`: the ids of the claims that
    decide the places; None if there is only one part.
    """
    rows = [_row(store, cell, errors.get(cell.run_id), selection) for cell in cells]
    return sorted(rows, key=lambda row: -row.accuracy)


def _row(
    store: Store, cell: Cell, error: str | None, selection: Collection[str] | None
) -> LeaderboardRow:
    status = run_status(store, cell.run_id)
    selected = None
    if selection is not None:
        selected = _quality(store, cell, lambda claim_id: claim_id in selection)
    return LeaderboardRow(
        name=cell.name,
        prompt=cell.prompt,
        model=cell.model,
        run_id=cell.run_id,
        context_id=cell.submission.run.context.context_id,
        directory=cell.directory,
        claims=status and status.total,
        done=0 if status is None else status.done,
        dead=0 if status is None else status.dead,
        complete=status is not None and status.complete,
        error=error,
        selected=selected,
        quality=_quality(
            store, cell, lambda claim_id: selection is None or claim_id not in selection
        ),
    )


def _quality(store: Store, cell: Cell, among: Callable[[str], bool]) -> Quality | None:
    try:
        known = find_run(store, cell.run_id)
    except StoreError:
        return None  # the sweep was stopped before it was announced
    return quality_of(store, known, among)


def print_leaderboard(console: Screen, rows: Sequence[LeaderboardRow]) -> None:
    """The table, within 80 columns, and what its numbers mean."""
    has_selection = any(row.selected is not None for row in rows)
    models = len({row.model for row in rows}) > 1
    table = plain_table()
    table.add_column("prompt", overflow="ellipsis", min_width=10)
    if models:
        table.add_column("model", overflow="ellipsis", min_width=10)
    selected = ["selected by"] if has_selection else []
    add_numbers(table, *selected, "accuracy", "95 % interval", "claims")
    for row in rows:
        table.add_row(
            Text(row.prompt, no_wrap=True),
            *([Text(row.model, no_wrap=True)] if models else []),
            *([_accuracy(row.selected)] if has_selection else []),
            _accuracy(row.quality),
            "" if row.quality is None else _interval(row.quality),
            "" if row.quality is None else f"{row.quality.labelled:,}",
        )
    show(console, table)
    for note in _notes(rows):
        show(console, Text(note))


def _accuracy(quality: Quality | None) -> str:
    return "" if quality is None else f"{quality.accuracy:.3f}"


def _interval(quality: Quality) -> str:
    low, high = quality.accuracy_interval
    return f"{low:.3f} to {high:.3f}"


def _notes(rows: Sequence[LeaderboardRow]) -> Iterator[str]:
    for row in rows:
        if not row.complete:
            of_total = "" if row.claims is None else f" of {row.claims:,}"
            yield f"{row.name} is not complete: {row.done + row.dead:,}{of_total} claims are done."
    scored = [row.quality for row in rows if row.quality is not None]
    if not scored:
        yield "No accuracy: no verdict is on a claim with a gold label that its prompt has."
        return
    selected = [row.selected.labelled for row in rows if row.selected is not None]
    if selected:
        yield (
            f"The order is that of the accuracy on {max(selected):,} selected claims; accuracy, "
            "interval and claims are those of the others."
        )
    elif len(rows) > 1:
        yield (
            "The best of several cells looks better than it is on the claims that chose it; with "
            "`select: 0.5` half of the claims choose, and the accuracy is that of the others."
        )
    if len({quality.labelled for quality in scored}) > 1:
        yield "Cells are scored on different claims, so their accuracies are not comparable."
    yield "Intervals are Wilson's, for each cell; `keepwarm compare` says which differ."
