from pathlib import Path

from services.cli.finished import finished_in, nothing_finished
from services.collector import Store
from services.contracts import Claim, Run, load_settings

CLAIMS = [Claim(claim_id=f"c{n}", position=n, text="C.") for n in range(4)]


def test_claims_with_an_outcome_in_the_run_are_finished(stored: Path, run: Run) -> None:
    store = Store.open(load_settings(store_url=str(stored)))
    assert set(finished_in(store, run.run_id)(CLAIMS)) == {"c0", "c1"}
    assert set(finished_in(store, "run-other")(CLAIMS)) == set()
    store.close()


def test_without_a_store_nothing_is_finished() -> None:
    assert not nothing_finished(CLAIMS)
