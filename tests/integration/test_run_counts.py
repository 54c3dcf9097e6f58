"""The counters of runs in PostgreSQL, with several collectors, against a count of all rows."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings

from services.contracts import ContextSpec, Run, load_settings
from services.contracts.errors import StoreError
from services.store import Store, dead_claims, reopen_dead
from tests.integration.postgres import PostgreSQL
from tests.run_counts import (
    announced,
    assert_counters_are_those_of_the_rows,
    operations,
    recounted,
    stored,
)
from tests.unit.stores import make, other_run, prompt, run

__all__ = ["make", "other_run", "prompt", "run"]

_COLLECTORS, _WRITES = 4, 40


@pytest.fixture(scope="session")
def context() -> ContextSpec:
    return ContextSpec(model="models/small", revision="files-0011223344556677")


@given(operations=operations)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_whatever_happens_to_a_run_its_counters_are_those_of_its_rows(
    operations: list[tuple[Any, ...]],
    postgresql: PostgreSQL,
    make: SimpleNamespace,
    run: Run,
    other_run: Run,
) -> None:
    at = load_settings(store_url=postgresql.new_database())
    assert_counters_are_those_of_the_rows(at, make, [run, other_run], operations)


def until_committed(write: Callable[[], object]) -> None:
    """Retries, as the collector does: two may wait for claims of each other."""
    while True:
        try:
            write()
        except StoreError as error:
            assert "deadlock" in str(error)
        else:
            return


def test_collectors_that_write_the_same_claims_at_once_count_each_outcome_once(
    postgresql: PostgreSQL, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    """While dead claims are reopened."""
    at = load_settings(store_url=postgresql.new_database())
    of = [run, other_run]

    def collect(seed: int) -> None:
        chance = random.Random(seed)
        with Store.open(at) as store:
            for _ in range(_WRITES):
                messages = [announced(run), make.returned(1), make.returned(2, of=other_run)]
                for _ in range(3):
                    which, numbers = chance.choice(of), chance.sample(range(40), 6)
                    dead = [make.dead(number, of=which) for number in numbers]
                    batch = make.batch(*map(make.verdict, numbers), of=which, attempt=seed + 1)
                    messages += dead if chance.random() < 0.5 else [batch]
                incoming = make.incoming(*messages)
                until_committed(lambda incoming=incoming: store.write(incoming))
                some = chance.choices(dead_claims(store) or [None], k=3)
                chosen = [row for row in some if row is not None]
                until_committed(lambda chosen=chosen: reopen_dead(store, chosen))

    with ThreadPoolExecutor(_COLLECTORS) as pool:
        list(pool.map(collect, range(_COLLECTORS)))
    with Store.open(at) as store:
        returned = dict.fromkeys((run.run_id, other_run.run_id), _COLLECTORS * _WRITES)
        assert stored(store) == recounted(store, returned)
