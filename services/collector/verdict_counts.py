"""Verdicts of a run by label, and how many are right: counted as they are written."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, case, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from services.collector.schema import outcomes, verdict_counts

_COUNTED = ("verdicts", "judged", "correct")


class Gained:
    """What a transaction adds to the counts."""

    def __init__(self) -> None:
        self._verdicts: Counter[tuple[int, str, str | None]] = Counter()

    def add(self, run_key: int, labels: Iterable[tuple[str, str | None]]) -> None:
        """The label and the gold label of each verdict that a run gained."""
        for (label, gold), number in Counter(labels).items():
            self._verdicts[run_key, label, gold] += number

    def replace_gold(self, run_key: int, label: str, old: str | None, new: str | None) -> None:
        """A verdict that is counted already has another gold label now."""
        self._verdicts[run_key, label, old] -= 1
        self._verdicts[run_key, label, new] += 1

    def write(self, connection: Connection) -> None:
        """To be called last in the transaction: until its end it holds these rows, which others who
        write verdicts of the same runs want too. All want them in the same order.
        """
        rows: dict[tuple[int, str], dict[str, Any]] = {}
        for (run_key, label, gold), number in self._verdicts.items():
            row = rows.setdefault(
                (run_key, label),
                {"run_key": run_key, "label": label} | dict.fromkeys(_COUNTED, 0),
            )
            row["verdicts"] += number
            row["judged"] += number if gold is not None else 0
            row["correct"] += number if gold == label else 0
        if rows:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            upsert = dialect.insert(verdict_counts)
            connection.execute(
                upsert.on_conflict_do_update(
                    index_elements=list(verdict_counts.primary_key),
                    set_={n: verdict_counts.c[n] + upsert.excluded[n] for n in _COUNTED},
                ),
                [rows[key] for key in sorted(rows)],
            )


def count_all(connection: Connection) -> None:
    """Count what was written before there were counts: a look at every outcome in the store."""
    agrees = case((outcomes.c.gold == outcomes.c.label, 1), else_=0)
    counted = (
        select(
            outcomes.c.run_key,
            outcomes.c.label,
            func.count(),
            func.count(outcomes.c.gold),
            func.sum(agrees),
        )
        .where(outcomes.c.label.is_not(None))
        .group_by(outcomes.c.run_key, outcomes.c.label)
    )
    connection.execute(insert(verdict_counts).from_select(["run_key", "label", *_COUNTED], counted))
