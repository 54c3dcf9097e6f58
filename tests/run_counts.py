"""Random operations on a store, and a recount of what it counts, from all its rows."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import select

from services.contracts import Run, RunAnnouncement, Settings, Totals
from services.contracts.proofs import ClaimsDigest
from services.store import Store, dead_claims, drop_dead, known_runs, reopen_dead
from services.store.schema import deliveries, outcomes, run_counts, verdict_counts
from tests.older_stores import downgrade

_CLAIMS = range(4)
_runs = st.integers(0, 1)
_claims = st.sampled_from(_CLAIMS)
_verdicts = st.lists(
    st.tuples(_claims, st.sampled_from(["A", "C", "INVALID"]), st.integers(0, 1)),
    min_size=1,
    max_size=4,
)
_answered = st.tuples(st.just("verdicts"), _runs, _verdicts, st.integers(1, 2))
_died = st.tuples(st.just("dead"), _runs, _claims)
_messages = st.one_of(
    _answered,
    _died,
    st.tuples(st.just("returned"), _runs, st.integers(1, 3)),
    st.tuples(st.just("announced"), _runs),
)
_written = st.tuples(
    st.just("write"),
    st.one_of(*(st.lists(each, min_size=1) for each in (_answered, _died, _messages))),
)
_golds = st.dictionaries(_claims, st.sampled_from([None, "A", "C"]))
operations = st.lists(
    st.one_of(
        _written,
        _written,
        st.tuples(st.just("gold"), _runs, _golds),
        st.tuples(st.sampled_from(["reopen", "drop"]), st.sets(_claims)),
        st.tuples(st.just("remove"), _runs, st.sets(_claims)),
        st.tuples(st.just("cancel")),
        st.tuples(st.just("upgrade")),
    ),
    min_size=4,
    max_size=12,
)


class Operations:
    """Applies operations to a store of announced runs. It counts the returned claims: no row of the
    store says which these were.
    """

    def __init__(self, make: SimpleNamespace, of: Sequence[Run]) -> None:
        self._make = make
        self._of = of
        self.returned: Counter[str] = Counter()

    def apply(self, store: Store, operation: tuple[Any, ...]) -> None:
        match operation:
            case "write", messages:
                store.write(self._make.incoming(*map(self._message, messages)))
            case "gold", run, golds:
                store.set_gold(self._of[run].run_id, {f"c{n}": gold for n, gold in golds.items()})
            case "reopen" | "drop" as kind, claims:
                change = reopen_dead if kind == "reopen" else drop_dead
                change(store, dead_claims(store, None, [f"c{number}" for number in claims]))
            case "remove", run, kept:
                store.remove_foreign(self._of[run].run_id, map(self._make.claim, sorted(kept)))
            case ("cancel",):
                for known in known_runs(store):
                    store.cancel(known.run_key)

    def _message(self, message: tuple[Any, ...]) -> Any:
        make, of = self._make, self._of[message[1]]
        match message:
            case "verdicts", _, verdicts, attempt:
                answered = (
                    # An older producer's claim may come with another position.
                    make.verdict(n, label, gold="A" if n % 2 else None, position=n + moved)
                    for n, label, moved in verdicts
                )
                return make.batch(*answered, of=of, attempt=attempt, worker_id=f"node-{attempt}")
            case "dead", _, number:
                return make.dead(number, of=of)
            case "returned", _, count:
                self.returned[of.run_id] += count
                return make.returned(*range(count), of=of)
            case _:
                return announced(of)


def announced(run: Run) -> RunAnnouncement:
    claims = [(f"c{number}", number) for number in _CLAIMS]
    return RunAnnouncement(
        run=run,
        submission_id=f"sub-{run.run_id}",
        totals=Totals(lines=len(claims), claims=len(claims), repeated=0, rejected=0),
        digest=str(ClaimsDigest.of(claims)),
    )


def assert_counters_are_those_of_the_rows(
    at: Settings, make: SimpleNamespace, runs: Sequence[Run], operations: Sequence[tuple[Any, ...]]
) -> None:
    """Apply the operations to a new store, and recount after each."""
    store = Store.open(at)
    store.write(make.incoming(*(make.announced(of=run) for run in runs)))
    happening = Operations(make, runs)
    for operation in operations:
        if operation == ("upgrade",):
            with store.transaction() as connection:
                downgrade(connection, 6)
            store.close()
            store = Store.open(at)
        happening.apply(store, operation)
        assert stored(store) == recounted(store, happening.returned)
    store.close()


_LABEL_COUNTERS = ("verdicts", "judged", "correct")
_RUN_COUNTERS = ("dead", "messages", "duplicates", "lost_work", "returned", "high", "low")
Counters = dict[tuple[int, str], int | None]


def stored(store: Store) -> Counters:
    """The counters of the store, by run and name; a label's have its name before theirs."""
    counters: Counters = {}
    with store.transaction() as connection:
        for row in connection.execute(select(verdict_counts)):
            for name in _LABEL_COUNTERS:
                counters[row.run_key, f"{row.label} {name}"] = getattr(row, name)
        for row in connection.execute(select(run_counts)):
            for name in _RUN_COUNTERS:
                counters[row.run_key, name] = getattr(row, name)
    return {key: number for key, number in counters.items() if number != 0}


def recounted(store: Store, returned: Mapping[str, int]) -> Counters:
    """The same from the rows of outcomes and deliveries."""
    counters: Counter[tuple[int, str]] = Counter()
    claims: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    with store.transaction() as connection:
        for row in connection.execute(select(outcomes)):
            claims[row.run_key].append((row.claim_id, row.position))
            if row.label is None:
                counters[row.run_key, "dead"] += 1
            else:
                counters[row.run_key, f"{row.label} verdicts"] += 1
                counters[row.run_key, f"{row.label} judged"] += row.gold is not None
                counters[row.run_key, f"{row.label} correct"] += row.gold == row.label
        for row in connection.execute(select(deliveries)):
            counters[row.run_key, "messages"] += 1
            counters[row.run_key, "duplicates"] += row.duplicates
            if row.attempt > 1:
                counters[row.run_key, "lost_work"] += row.fresh + row.duplicates
    for known in known_runs(store):
        digest = ClaimsDigest.of(claims[known.run_key])
        counters[known.run_key, "high"] = digest.high
        counters[known.run_key, "low"] = digest.low
        counters[known.run_key, "returned"] = returned[known.run_id]
    return {key: number for key, number in counters.items() if number != 0}
