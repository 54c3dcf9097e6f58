from types import SimpleNamespace

import pytest

from services.contracts import Run, Verdict
from services.store import LowMass, Store, build_report, find_run, run_status


def verdicts(make: SimpleNamespace, masses: list[float], says: str = " False") -> list[Verdict]:
    return [
        make.verdict(n, "A").model_copy(update={"mass": mass, "raw_text": says})
        for n, mass in enumerate(masses)
    ]


def low(store: Store, run: Run) -> LowMass | None:
    status = run_status(store, run.run_id)
    assert status is not None
    return status.low_mass


def test_labels_with_low_mass_are_reported_with_the_models_answer(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    some = verdicts(make, [0.0006] * 40) + verdicts(make, [0.5] * 30, says="True")
    different = [v.model_copy(update={"claim_id": f"c{n}"}) for n, v in enumerate(some)]
    store.write(make.incoming(make.announced(claims=1_000), make.batch(*different[:40])))
    found = low(store, run)
    assert found == LowMass(claims=40, median=0.0006, says=" False")
    assert str(found) == (
        "the labels have 0.06 % of the probability; the model answers ' False' "
        "(median of 40 claims)"
    )


@pytest.mark.parametrize("masses", [[0.5] * 70, [0.1] * 70, [0.001] * 31 + [0.4] * 33, []])
def test_labels_with_enough_mass_are_not_reported(
    masses: list[float], store: Store, make: SimpleNamespace, run: Run
) -> None:
    batches = [make.batch(*verdicts(make, masses))] if masses else []
    store.write(make.incoming(make.announced(claims=max(1, len(masses))), *batches))
    assert low(store, run) is None


@pytest.mark.parametrize(("claims", "told"), [(100, False), (7, True)])
def test_few_verdicts_tell_only_once_they_are_all(
    claims: int, told: bool, store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(
        make.incoming(make.announced(claims=claims), make.batch(*verdicts(make, [0.01] * 7)))
    )
    assert (low(store, run) is not None) is told


def test_at_most_one_batch_of_verdicts_is_read(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    store.write(make.incoming(make.announced(), make.batch(*verdicts(make, [0.01] * 200))))
    found = low(store, run)
    assert found is not None and found.claims == 64


def test_dead_claims_have_no_mass(store: Store, make: SimpleNamespace, run: Run) -> None:
    store.write(make.incoming(make.announced(claims=9), *(make.dead(n) for n in range(9))))
    assert low(store, run) is None
    assert build_report(store, find_run(store, run.run_id)).mean_mass is None


def test_the_report_has_the_mean_of_all_verdicts(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    masses = [0.25, 0.5, 0.75, 1.0]
    store.write(make.incoming(make.announced(claims=4), make.batch(*verdicts(make, masses))))
    report = build_report(store, find_run(store, run.run_id))
    assert report.mean_mass == pytest.approx(0.625)
    assert report.status.low_mass is None


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "less than 0.01 %"),
        (0.00005, "less than 0.01 %"),
        (0.00061, "0.061 %"),
        (0.0392, "3.9 %"),
    ],
)
def test_shares_are_shown_as_people_write_them(share: float, shown: str) -> None:
    assert f"have {shown} of" in str(LowMass(claims=64, median=share, says="x"))
