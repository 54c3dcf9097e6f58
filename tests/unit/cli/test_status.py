"""What `keepwarm status` says of runs that will not be complete by themselves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from services.contracts import Run, RunAnnouncement, Totals, load_settings
from services.contracts.proofs import ClaimsDigest, Positions
from services.store import Incoming, Store

Command = Callable[..., int]


def announce(stored: Path, run: Run, positions: list[int] | None, **changes: object) -> None:
    """The run of `stored`, in which two claims have a verdict, as one with more claims."""
    text = None
    if positions is not None:
        sent = Positions()
        sent.add(positions)
        text = sent.as_text()
    count = 2 if positions is None else len(positions)
    totals = Totals(lines=count, claims=count, repeated=0, rejected=0)
    fields = {"run": run, "submission_id": "sub-9", "totals": totals, "positions": text, **changes}
    with Store.open(load_settings(store_url=str(stored))) as store:
        store.write(Incoming([RunAnnouncement(**fields)]))
        if positions is not None:
            store.note_missing_claims([run.run_id])


@pytest.fixture
def said(stored: Path, keepwarm: Command, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    def words() -> str:
        assert keepwarm("status", "--store", str(stored)) == 0
        return capsys.readouterr().out

    return words


def test_missing_claims_are_shown_with_their_records_and_the_next_step(
    said: Callable[[], str], stored: Path, run: Run
) -> None:
    announce(stored, run, [*range(5), *range(10, 50, 2)])
    shown = said()
    assert "claims missing" in shown
    assert (
        "23 claims are in no queue and at no worker (records 3 to 5, 11, 13, 15, 17, 19, 21, 23, "
        "25, 27, … of the file). Check `keepwarm dead list --broker URL`, or submit "
        "the file again with this store to send only these"
    ) in shown


def test_outcomes_of_other_claims_are_reported(
    said: Callable[[], str], stored: Path, run: Run
) -> None:
    announce(stored, run, None, digest=str(ClaimsDigest.of([("other", 0)])))
    shown = said()
    assert "wrong claims" in shown
    assert f"{run.run_id}: some outcomes belong to claims that are not in the file." in shown
