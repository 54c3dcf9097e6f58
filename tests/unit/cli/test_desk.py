"""What a desk does before its parts start and after they ended; the rest is shown end to end."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.cli.desk import Desk
from services.cli.label_mass import MassWatch
from services.cli.screen import Screen
from services.contracts import (
    ContextSpec,
    PromptSpec,
    Run,
    RunAnnouncement,
    Totals,
    Verdict,
    VerdictBatch,
    load_settings,
)
from services.contracts.errors import LabelsUnlikely, RunIncomplete, StoreError, UsageError
from services.node.device import Device
from services.producer import ClaimsFile, Source, Submission
from services.store import Incoming, Store

Maker = Callable[..., Desk]


@pytest.fixture
def submission(tmp_path: Path, context: ContextSpec, prompt: PromptSpec) -> Iterator[Submission]:
    path = tmp_path / "claims.jsonl"
    path.write_text('{"id": "a", "claim": "One."}\n{"id": "b", "claim": "Two."}\n')
    with Source.open(str(path)) as source:
        yield Submission(ClaimsFile(source, prompt), context)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(load_settings(store_url=str(tmp_path / "store.sqlite")))
    yield store
    store.close()


@pytest.fixture
def desk(submission: Submission, database: Store, tmp_path: Path, screen: Screen) -> Maker:
    def make(
        directory: Path = tmp_path / "out",
        *,
        workers: int = 1,
        mass: MassWatch | None = None,
        **settings: object,
    ) -> Desk:
        directory.mkdir(exist_ok=True)
        return Desk(
            submission,
            load_settings(**settings),
            database,
            directory,
            directory,
            screen,
            workers=workers,
            mass=mass or MassWatch(screen, allowed=False),
        )

    return make


def announced(run: Run, totals: Totals) -> RunAnnouncement:
    return RunAnnouncement(run=run, submission_id="sub-1", totals=totals)


def store_outcomes(
    database: Store, submission: Submission, count: int, *, mass: float = 1.0, of: int = 2
) -> None:
    run = submission.run
    verdicts = tuple(
        Verdict(
            claim_id="ab"[n] if of == 2 else f"c{n:03}",
            position=n,
            text="C.",
            label="SUPPORTS",
            probabilities=(1.0, 0.0, 0.0),
            mass=mass,
            raw_text="True",
            prompt_tokens=1,
        )
        for n in range(count)
    )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id="b",
        labels=run.prompt.label_names,
        verdicts=verdicts,
        worker_id="w",
        device="d",
        attempt=1,
        engine_seconds=1.0,
    )
    totals = Totals(lines=of, claims=of, repeated=0, rejected=0)
    database.write(Incoming([announced(run, totals)], [batch], []))


def seen(screen: Screen) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_run_that_is_complete_already_starts_nothing(
    desk: Maker, database: Store, submission: Submission, tmp_path: Path, screen: Screen
) -> None:
    store_outcomes(database, submission, 2)
    assert desk().work() is None
    assert "Every claim has an outcome already." in seen(screen)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_whose_labels_hold_nothing_is_not_begun_again(
    desk: Maker, database: Store, submission: Submission, screen: Screen
) -> None:
    store_outcomes(database, submission, 64, mass=0.0006, of=1_000)
    watch = MassWatch(screen, allowed=False)
    assert desk(mass=watch).work() is None  # and no broker was started
    assert "Warning: the labels have 0.06 % of the probability; the model answers 'True'" in seen(
        screen
    )
    with pytest.raises(LabelsUnlikely, match="The run was stopped.*rerun.*--allow-low-mass"):
        watch.raise_if_low()


def test_a_run_that_is_complete_and_whose_labels_hold_nothing_ends_with_an_error(
    desk: Maker, database: Store, submission: Submission, screen: Screen
) -> None:
    store_outcomes(database, submission, 2, mass=0.04)
    watch = MassWatch(screen, allowed=False)
    assert desk(mass=watch).work() is None
    with pytest.raises(LabelsUnlikely, match=r"4 % of the probability.*enable_thinking: false"):
        watch.raise_if_low()


def test_with_leave_a_run_whose_labels_hold_nothing_goes_on(
    desk: Maker, database: Store, submission: Submission, screen: Screen
) -> None:
    store_outcomes(database, submission, 64, mass=0.0006, of=1_000)
    watch = MassWatch(screen, allowed=True)
    with pytest.raises(UsageError, match="the broker's URL is unusable"):
        desk(mass=watch, broker_url="http://nowhere").work()
    watch.raise_if_low()
    assert seen(screen).count("Warning: the labels have") == 1


def test_a_run_of_no_claims_at_all_is_not_taken_for_done(
    desk: Maker, database: Store, submission: Submission
) -> None:
    # It goes on to the broker, and would be told again what is wrong with its lines.
    totals = Totals(lines=2, claims=0, repeated=0, rejected=2)
    database.write(Incoming([announced(submission.run, totals)], [], []))
    with pytest.raises(UsageError, match="the broker's URL is unusable"):
        desk(broker_url="http://nowhere").work()


def test_more_workers_than_gpus_are_refused_before_anything_is_started(
    desk: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Device("cuda", "H100", 2**36, (0, 1))
    monkeypatch.setattr("services.cli.desk.find_device", lambda: gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match="--workers 2"):
        desk(workers=2).work()
    assert list((tmp_path / "out").iterdir()) == []


def test_results_are_rows_and_a_report(
    desk: Maker, database: Store, submission: Submission, tmp_path: Path, screen: Screen
) -> None:
    store_outcomes(database, submission, 1)
    desk().write_results()
    rows = (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
    assert [json.loads(row)["claim_id"] for row in rows] == ["a"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"]["run_id"] == submission.run.run_id
    assert report["status"]["done"] == 1
    assert "Results are in" in seen(screen)


def test_where_nothing_is_known_there_are_no_results(desk: Maker, tmp_path: Path) -> None:
    desk().write_results()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_report_that_cannot_be_written_is_a_store_error(
    desk: Maker, database: Store, submission: Submission, tmp_path: Path
) -> None:
    store_outcomes(database, submission, 1)
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"report\.json cannot be written: Is a directory"):
        desk().write_results()


@pytest.mark.parametrize("name", ["claims[final]-1", "a[bold]b", "x[/y]"])
def test_the_place_of_the_results_is_shown_as_it_is(
    name: str,
    desk: Maker,
    database: Store,
    submission: Submission,
    tmp_path: Path,
    screen: Screen,
) -> None:
    store_outcomes(database, submission, 1)
    directory = tmp_path / name
    directory.parent.mkdir(exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    desk(directory).write_results()
    assert f"/{name}/" in seen(screen).replace("\n", "")


def test_claims_that_the_broker_lost_are_sent_again(
    desk: Maker,
    database: Store,
    submission: Submission,
    screen: Screen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_outcomes(database, submission, 1)
    database.note_missing_claims([submission.run.run_id])
    one = desk()
    monkeypatch.setattr(one, "_publish", lambda _: store_outcomes(database, submission, 2))
    sent_all = threading.Thread()
    collector = SimpleNamespace(waiting_for=None)
    one._watch([], sent_all, collector, load_settings())  # type: ignore[arg-type]
    assert "RabbitMQ lost claims; sending them again." in seen(screen)


def test_a_run_with_outcomes_of_other_claims_ends_with_what_to_do(
    desk: Maker, database: Store, submission: Submission
) -> None:
    store_outcomes(database, submission, 2)
    other = announced(submission.run, Totals(lines=2, claims=2, repeated=0, rejected=0))
    database.write(Incoming([other.model_copy(update={"digest": "0" * 32})]))
    collector = SimpleNamespace(waiting_for=None)
    with pytest.raises(RunIncomplete, match="the same command removes them, and goes on"):
        desk()._watch([], threading.Thread(), collector, load_settings())  # type: ignore[arg-type]
