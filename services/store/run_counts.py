"""The counters of runs: changed in the transaction that writes what they count."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, Table, cast, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from services.contracts.proofs import MODULUS, ClaimsDigest
from services.store.schema import outcomes, run_counts, runs, verdict_counts

_DIGEST = ("high", "low")
_CHUNK_ROWS = 10_000

verdicts_of_run = (
    select(cast(func.coalesce(func.sum(verdict_counts.c.verdicts), 0), BigInteger))
    .where(verdict_counts.c.run_key == runs.c.run_key)
    .scalar_subquery()
)
"""In a query of `runs`: the number of the run's verdicts."""


COUNTED_COLUMNS = tuple(outcomes.c[name] for name in ("claim_id", "position", "label", "gold"))
"""The parts of an outcome that are counted."""


class RunCounts:
    """The changes to the counters that a transaction makes.

    Outcomes are rows, or mappings like rows, with at least `COUNTED_COLUMNS`.
    """

    def __init__(self) -> None:
        self._labels: Counter[tuple[int, str, str | None]] = Counter()
        self._runs: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def add(self, run_key: int, gained: Sequence[Mapping[Any, Any]]) -> None:
        """Add new outcomes of a run."""
        self._count(run_key, gained, 1)

    def remove(self, run_key: int, lost: Sequence[Mapping[Any, Any]]) -> None:
        """Subtract outcomes that were deleted."""
        self._count(run_key, lost, -1)

    def replace_gold(self, run_key: int, label: str, old: str | None, new: str | None) -> None:
        """Change the gold label of a verdict that is already counted."""
        self._labels[run_key, label, old] -= 1
        self._labels[run_key, label, new] += 1

    def change(self, run_key: int, **changes: int) -> None:
        """Add numbers to columns of `run_counts`."""
        self._runs[run_key].update(changes)

    def write(self, connection: Connection) -> None:
        """Apply the changes. To be called last in the transaction, because it locks rows that other
        writers of the same runs need. Rows are locked in one order, so writers do not deadlock.
        """
        labels: defaultdict[tuple[int, str], Counter[str]] = defaultdict(Counter)
        for (run_key, label, gold), number in self._labels.items():
            labels[run_key, label].update(
                verdicts=number,
                judged=number if gold is not None else 0,
                correct=number if gold == label else 0,
            )
        _add(connection, verdict_counts, labels)
        _add(connection, run_counts, {(key,): changes for key, changes in self._runs.items()})

    def _count(self, run_key: int, changed: Sequence[Mapping[Any, Any]], sign: int) -> None:
        kinds = Counter((each["label"], each["gold"]) for each in changed)
        for (label, gold), number in kinds.items():
            if label is None:
                self.change(run_key, dead=sign * number)
            else:
                self._labels[run_key, label, gold] += sign * number
        digest = ClaimsDigest.of((each["claim_id"], each["position"]) for each in changed)
        self.change(run_key, high=sign * digest.high, low=sign * digest.low)


def _add(
    connection: Connection, table: Table, changes: Mapping[tuple[Any, ...], Counter[str]]
) -> None:
    """Add numbers to the rows with these keys; NULL stays NULL."""
    if not changes:
        return
    keys = [column.name for column in table.primary_key]
    names = [column.name for column in table.columns if not column.primary_key]
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    upsert = dialect.insert(table)
    sums = {name: _bounded(name, table.c[name] + upsert.excluded[name]) for name in names}
    rows = [
        dict(zip(keys, key, strict=True))
        | {name: _bounded(name, changes[key][name]) for name in names}
        for key in sorted(changes)
    ]
    connection.execute(upsert.on_conflict_do_update(index_elements=keys, set_=sums), rows)


def _bounded(name: str, number: Any) -> Any:
    """A digest is a sum modulo 2**62."""
    return number % MODULUS if name in _DIGEST else number


def digest_of(connection: Connection, run_key: int, *which: ColumnElement[bool]) -> ClaimsDigest:
    """The digest of the run's outcomes, or of those for which a condition holds; reads them."""
    found = connection.execute(
        select(outcomes.c.claim_id, outcomes.c.position)
        .where(outcomes.c.run_key == run_key, *which)
        .execution_options(yield_per=_CHUNK_ROWS)
    )
    digest = ClaimsDigest()
    for rows in found.partitions():
        digest = digest.plus(ClaimsDigest.of((row.claim_id, row.position) for row in rows))
    return digest


def set_digest(connection: Connection, run_key: int, digest: ClaimsDigest) -> None:
    this = run_counts.c.run_key == run_key
    values = {"high": digest.high, "low": digest.low}
    connection.execute(update(run_counts).where(this).values(values))


def add_missing_digest(connection: Connection, run_key: int) -> None:
    """Compute the digest of a run that has none. To be called last in the transaction, like
    `RunCounts.write`.
    """
    this = run_counts.c.run_key == run_key
    missing = select(run_counts.c.run_key).where(this, run_counts.c.high.is_(None))
    if connection.execute(missing).first() is None:
        return  # without a lock, because rows are locked in no order here
    if connection.execute(missing.with_for_update()).first() is not None:
        set_digest(connection, run_key, digest_of(connection, run_key))
