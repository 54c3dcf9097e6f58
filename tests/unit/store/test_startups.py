import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.contracts import Run, StartupPhases
from services.store import Store, build_report, find_run
from services.store.startups import Attaches, ColdStarts, Startups


def startups_of(store: Store, run: Run) -> Startups | None:
    return build_report(store, find_run(store, run.run_id)).startups


def test_cold_starts_are_reported_by_device_and_other_attaches_apart(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=1),
            make.ready("1", seconds=60.0, phases=StartupPhases(load=8.0, compile=40.0)),
            make.ready("2", seconds=90.0, phases=StartupPhases(load=10.0)),
            make.ready("3", seconds=61.0, phases=StartupPhases(total=61.0)),
            make.ready("4", seconds=30.0, device="H100", phases=StartupPhases(total=29.0)),
            make.ready("5", warm=True, seconds=0.25),
            make.ready("6", warm=True, seconds=0.75, device="H100"),
            make.ready("7", seconds=58.0),
            make.ready("8", seconds=4.0),
        )
    )
    assert startups_of(store, run) == Startups(
        cold=(
            ColdStarts(
                device="Tesla T4",
                count=3,
                median_seconds=61.0,
                longest_seconds=90.0,
                phases=StartupPhases(load=9.0, compile=40.0, total=61.0),
            ),
            ColdStarts(
                device="H100",
                count=1,
                median_seconds=30.0,
                longest_seconds=30.0,
                phases=StartupPhases(total=29.0),
            ),
        ),
        warm=Attaches(count=2, median_seconds=0.5),
        joined=Attaches(count=2, median_seconds=31.0),
    )


def test_only_warm_starts_are_reported_without_a_cold_one(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.ready("1", warm=True, seconds=0.0)))
    found = startups_of(store, run)
    assert found == Startups(cold=(), warm=Attaches(count=1, median_seconds=0.0))


def test_starts_of_another_context_are_not_the_runs(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.ready("1", context_id="ctx-other")))
    assert startups_of(store, run) is None


def test_a_run_that_was_not_announced_has_no_context_and_no_starts(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.batch(make.verdict(0)), make.ready("1")))
    assert startups_of(store, run) is None


@pytest.mark.parametrize(("claims", "told"), [(1, ["3"]), (2, ["3", "4"]), (None, ["3", "4"])])
def test_starts_count_that_ended_while_the_run_lasted(
    claims: int | None,
    told: list[str],
    store: Store,
    make: SimpleNamespace,
    run: Run,
    tmp_path: Path,
) -> None:
    store.write(
        make.incoming(
            make.announced(claims=claims),
            make.batch(make.verdict(0)),
            *(
                make.ready(name, device=name, phases=StartupPhases(total=60.0))
                for name in ("1", "3", "4")
            ),
        )
    )
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("UPDATE runs SET first_seen = 2.0")
        database.execute("UPDATE deliveries SET received_at = 3.0")
        database.execute("UPDATE startups SET received_at = CAST(startup_id AS FLOAT)")
    found = startups_of(store, run)
    assert found is not None
    assert sorted(cold.device for cold in found.cold) == told
