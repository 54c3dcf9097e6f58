"""Counts of verdicts by label and a digest of them, updated in the verdicts' transaction."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, case, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from services.contracts.proofs import MODULUS, ClaimsDigest
from services.store.schema import outcomes, verdict_counts, verdict_digests

_COUNTED = ("verdicts", "judged", "correct")
_CHUNK_ROWS = 10_000


class CountedVerdict(NamedTuple):
    """The parts of a verdict that are counted."""

    label: str
    gold: str | None
    claim_id: str
    position: int


class LabelCounts:
    """The changes to the counts that a transaction makes."""

    def __init__(self) -> None:
        self._verdicts: Counter[tuple[int, str, str | None]] = Counter()
        self._digests: dict[int, ClaimsDigest] = {}

    def add(self, run_key: int, verdicts: Iterable[CountedVerdict]) -> None:
        """Add new verdicts of a run."""
        gained = list(verdicts)
        for (label, gold), number in Counter((one.label, one.gold) for one in gained).items():
            self._verdicts[run_key, label, gold] += number
        digest = ClaimsDigest.of((one.claim_id, one.position) for one in gained)
        self._digests[run_key] = self._digests.get(run_key, ClaimsDigest()).plus(digest)

    def remove(self, run_key: int, verdict: CountedVerdict) -> None:
        """Subtract a deleted verdict."""
        self._verdicts[run_key, verdict.label, verdict.gold] -= 1
        digest = ClaimsDigest.of([(verdict.claim_id, verdict.position)])
        self._digests[run_key] = self._digests.get(run_key, ClaimsDigest()).minus(digest)

    def replace_gold(self, run_key: int, label: str, old: str | None, new: str | None) -> None:
        """Change the gold label of a verdict that is already counted."""
        self._verdicts[run_key, label, old] -= 1
        self._verdicts[run_key, label, new] += 1

    def write(self, connection: Connection) -> None:
        """Apply the changes. To be called last in the transaction, because it locks rows that other
        writers of the same runs need. Rows are locked in one order, so writers do not deadlock.
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
            _add(connection, verdict_counts, _COUNTED, [rows[key] for key in sorted(rows)])
        if self._digests:
            sums = [
                {"run_key": key, "high": digest.high, "low": digest.low}
                for key, digest in sorted(self._digests.items())
            ]
            _add(connection, verdict_digests, ("high", "low"), sums, modulus=MODULUS)


def _add(
    connection: Connection,
    table: Table,
    names: Iterable[str],
    rows: list[dict[str, Any]],
    modulus: int | None = None,
) -> None:
    """Add numbers to the existing rows; NULL stays NULL."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    upsert = dialect.insert(table)
    sums = {name: table.c[name] + upsert.excluded[name] for name in names}
    if modulus is not None:
        sums = {name: total % modulus for name, total in sums.items()}
    connection.execute(
        upsert.on_conflict_do_update(index_elements=list(table.primary_key), set_=sums), rows
    )


def verdicts_digest(connection: Connection, run_key: int) -> ClaimsDigest | None:
    """The digest of the run's claims that have a verdict; None if it was not computed."""
    query = select(verdict_digests).where(verdict_digests.c.run_key == run_key)
    row = connection.execute(query).one_or_none()
    if row is None:
        return ClaimsDigest()
    return None if row.high is None else ClaimsDigest(row.high, row.low)


def count_digest(connection: Connection, run_key: int) -> None:
    """Compute the digest if it is missing; reads every verdict of the run. To be called last in
    the transaction, like `LabelCounts.write`.
    """
    existing = select(verdict_digests).where(verdict_digests.c.run_key == run_key)
    row = connection.execute(existing.with_for_update()).one_or_none()
    if row is None or row.high is not None:
        return
    digest = ClaimsDigest()
    verdicts = connection.execute(
        select(outcomes.c.claim_id, outcomes.c.position)
        .where(outcomes.c.run_key == run_key, outcomes.c.label.is_not(None))
        .execution_options(yield_per=_CHUNK_ROWS)
    )
    for rows in verdicts.partitions():
        digest = digest.plus(ClaimsDigest.of((each.claim_id, each.position) for each in rows))
    connection.execute(
        update(verdict_digests)
        .where(verdict_digests.c.run_key == run_key)
        .values(high=digest.high, low=digest.low)
    )


def count_all(connection: Connection) -> None:
    """Count the verdicts of a store that has no counts yet; reads every outcome."""
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
