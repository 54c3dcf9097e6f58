"""A run before its services start and after they ended; the integration tests have the rest."""

import io
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from services.cli.label_mass import MassWatch
from services.cli.live_view import RunView
from services.cli.prepare_submission import finished_in
from services.cli.screen import Screen
from services.contracts import (
    ContextSpec,
    PromptSpec,
    Run,
    RunAnnouncement,
    Settings,
    Totals,
    Verdict,
    VerdictBatch,
    load_settings,
)
from services.contracts.errors import (
    BrokerError,
    EngineError,
    LabelsUnlikely,
    RunIncomplete,
    UsageError,
)
from services.local.local_run import LocalRun, by_context
from services.node.device import Device
from services.producer import ClaimsFile, Source, Submission
from services.store import Incoming, Store, run_status

MakeRun = Callable[..., LocalRun]


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A run sets signal handlers; restore those of the test run."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
def screen() -> Screen:
    """A console that remembers what it printed."""
    return Screen(file=io.StringIO(), width=160, force_terminal=False)


@pytest.fixture
def make_run(submission: Submission, database: Store, output_dir: Path, screen: Screen) -> MakeRun:
    def make(*, workers: int = 1, mass: MassWatch | None = None, **settings: object) -> LocalRun:
        watch = mass or MassWatch(screen, allowed=False)
        return LocalRun(
            [submission],
            load_settings(**settings),
            database,
            RunView(screen, submission.file.records_to_read, {submission.run.run_id: watch}),
            partial(finished_in, database),
            output_dir=output_dir,
            data_dir=output_dir,
            workers=workers,
        )

    return make


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def announced(run: Run, totals: Totals) -> RunAnnouncement:
    return RunAnnouncement(run=run, submission_id=f"sub-{run.run_id}", totals=totals)


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


def printed(screen: Screen) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_run_that_is_complete_already_starts_nothing(
    make_run: MakeRun, database: Store, submission: Submission, tmp_path: Path, screen: Screen
) -> None:
    store_outcomes(database, submission, 2)
    assert make_run().run() is None
    assert "Every claim has an outcome already." in printed(screen)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_whose_labels_hold_nothing_is_not_begun_again(
    make_run: MakeRun, database: Store, submission: Submission, screen: Screen
) -> None:
    store_outcomes(database, submission, 64, mass=0.0006, of=1_000)
    watch = MassWatch(screen, allowed=False)
    assert make_run(mass=watch).run() is None  # and no broker was started
    assert (
        "Warning: the labels have 0.06 % of the probability; the model answers 'True'"
        in printed(screen)
    )
    with pytest.raises(LabelsUnlikely, match="The run was stopped.*rerun.*--allow-low-mass"):
        watch.raise_if_low()


def test_a_run_that_is_complete_and_whose_labels_hold_nothing_ends_with_an_error(
    make_run: MakeRun, database: Store, submission: Submission, screen: Screen
) -> None:
    store_outcomes(database, submission, 2, mass=0.04)
    watch = MassWatch(screen, allowed=False)
    assert make_run(mass=watch).run() is None
    with pytest.raises(LabelsUnlikely, match=r"4 % of the probability.*enable_thinking: false"):
        watch.raise_if_low()


def test_with_leave_a_run_whose_labels_hold_nothing_goes_on(
    make_run: MakeRun, database: Store, submission: Submission, screen: Screen
) -> None:
    store_outcomes(database, submission, 64, mass=0.0006, of=1_000)
    watch = MassWatch(screen, allowed=True)
    with pytest.raises(UsageError, match="the broker's URL is unusable"):
        make_run(mass=watch, broker_url="http://nowhere").run()
    watch.raise_if_low()
    assert printed(screen).count("Warning: the labels have") == 1


def test_a_run_of_no_claims_at_all_is_not_taken_for_done(
    make_run: MakeRun, database: Store, submission: Submission
) -> None:
    # It continues to the broker, and reports again what is wrong with its lines.
    totals = Totals(lines=2, claims=0, repeated=0, rejected=2)
    database.write(Incoming([announced(submission.run, totals)], [], []))
    with pytest.raises(UsageError, match="the broker's URL is unusable"):
        make_run(broker_url="http://nowhere").run()


def test_more_workers_than_gpus_are_refused_before_anything_is_started(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Device("cuda", "H100", 2**36, (0, 1))
    monkeypatch.setattr("services.local.local_run.find_device", lambda: gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match="--workers 2"):
        make_run(workers=2).run()
    assert list((tmp_path / "out").iterdir()) == []


def collector(**attributes: object) -> MagicMock:
    """One that waits for nothing and has had no heartbeat."""
    return MagicMock(
        **{"waiting_for": None, "broker_error": None, "worker": lambda _: None} | attributes
    )


def sends(
    local_run: LocalRun, monkeypatch: pytest.MonkeyPatch, *publish: Callable[[], None]
) -> list[str]:
    """Let each sending of runs be one of these functions; the ids of the runs that were sent."""
    times = iter(publish)
    sent: list[str] = []

    def send(submissions: Sequence[Submission], _: Settings) -> None:
        next(times)()
        sent.extend(each.run.run_id for each in submissions)
        local_run._sent |= {each.run.run_id for each in submissions}

    monkeypatch.setattr(local_run, "_publish", send)
    return sent


def nothing() -> None:
    pass


def test_claims_that_the_broker_lost_are_sent_again(
    make_run: MakeRun,
    database: Store,
    submission: Submission,
    screen: Screen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_outcomes(database, submission, 1)
    database.note_missing_claims([submission.run.run_id])
    local_run = make_run()
    sent = sends(local_run, monkeypatch, nothing, lambda: store_outcomes(database, submission, 2))
    local_run._watch([submission], [], collector(), load_settings())
    assert sent == [submission.run.run_id] * 2
    assert "RabbitMQ lost claims; sending them again." in printed(screen)
    assert not local_run.failures


def test_a_run_whose_keeper_ended_does_not_wait_for_its_broker(
    make_run: MakeRun,
    database: Store,
    submission: Submission,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_outcomes(database, submission, 1)
    local_run = make_run()
    sends(local_run, monkeypatch, nothing)
    local_run._borrowed = SimpleNamespace(ended=True)  # type: ignore[assignment]
    collects = collector()
    with pytest.raises(BrokerError, match="keeper ended.* rerun the command to resume"):
        local_run._watch([submission], [], collects, load_settings())
    collects.stop.assert_called_once()


def test_a_run_with_outcomes_of_other_claims_ends_with_what_to_do(
    make_run: MakeRun,
    database: Store,
    submission: Submission,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_outcomes(database, submission, 2)
    other = announced(submission.run, Totals(lines=2, claims=2, repeated=0, rejected=0))
    database.write(Incoming([other.model_copy(update={"digest": "0" * 32})]))
    local_run = make_run()
    sends(local_run, monkeypatch, nothing)
    local_run._watch([submission], [], collector(), load_settings())
    error = local_run.failures[submission.run.run_id]
    assert isinstance(error, RunIncomplete)
    assert "rerun the command to remove them" in str(error)


def test_a_run_can_be_stopped_while_its_broker_starts_again(
    make_run: MakeRun, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    sends(run, monkeypatch, nothing)

    class Node:
        alive = False

        def start(self, stopped: Callable[[], bool] = lambda: False) -> None:
            run._stop(signal.SIGINT)
            assert stopped()
            raise BrokerError("stopped before the private RabbitMQ node was ready")

    run._private_node = Node()  # type: ignore[assignment]
    run._watch([submission], [], collector(), load_settings())


@pytest.fixture
def submissions(tmp_path: Path, prompt: PromptSpec) -> Iterator[Callable[..., Submission]]:
    """`submissions(context, "name")` is a run of the same two claims with a prompt of this name."""
    path = tmp_path / "claims.jsonl"
    path.write_text('{"id": "a", "claim": "One."}\n{"id": "b", "claim": "Two."}\n')
    with Source.open(str(path)) as source:

        def of(context: ContextSpec, name: str) -> Submission:
            return Submission(ClaimsFile(source, prompt.model_copy(update={"name": name})), context)

        yield of


def test_contexts_of_one_engine_follow_each_other_and_so_do_their_runs(
    submissions: Callable[..., Submission],
) -> None:
    plain, other = ContextSpec(model="m"), ContextSpec(model="other")
    first, second = (ContextSpec(model="m", adapter=name) for name in ("first", "second"))
    given = [
        submissions(context, name)
        for name in ("a", "b")
        for context in (first, other, second, plain)
    ]
    groups = by_context(given)
    assert [group[0].run.context for group in groups] == [first, second, other, plain]
    assert all([each.run.prompt.name for each in group] == ["a", "b"] for group in groups)


@pytest.fixture
def make_runs(database: Store, output_dir: Path, screen: Screen) -> Callable[..., LocalRun]:
    def make(*given: Submission) -> LocalRun:
        watches = {each.run.run_id: MassWatch(screen, allowed=False) for each in given}
        return LocalRun(
            given,
            load_settings(),
            database,
            RunView(screen, 2 * len(given), watches, {each: each for each in watches}),
            partial(finished_in, database),
            output_dir=output_dir,
            data_dir=output_dir,
            workers=1,
        )

    return make


def test_a_worker_that_cannot_serve_fails_the_runs_of_its_context_that_are_not_complete(
    make_runs: Callable[..., LocalRun],
    submissions: Callable[..., Submission],
    database: Store,
    context: ContextSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, open_run = submissions(context, "done"), submissions(context, "open")
    store_outcomes(database, done, 2)
    store_outcomes(database, open_run, 1)
    local_run = make_runs(done, open_run)
    sends(local_run, monkeypatch, nothing)
    no_engine = EngineError("no engine")
    worker = MagicMock(state="working", answered=0, losses=0)
    worker.replace_if_lost.side_effect = no_engine
    local_run._watch([done, open_run], [worker], collector(), load_settings())
    assert local_run.failures == {open_run.run.run_id: no_engine}


@pytest.mark.parametrize(
    ("contexts", "done", "given_back"),
    [(1, 2, True), (1, 1, False), (2, 2, False)],
    ids=["complete", "not complete", "several contexts"],
)
def test_a_lent_broker_is_given_back_after_complete_runs_of_one_context(
    contexts: int,
    done: int,
    given_back: bool,
    make_runs: Callable[..., LocalRun],
    submissions: Callable[..., Submission],
    database: Store,
) -> None:
    given = [submissions(ContextSpec(model=f"m{n % contexts}"), f"p{n}") for n in range(2)]
    local_run = make_runs(*given)
    for submission in given:
        store_outcomes(database, submission, done)
        local_run._is_finished(submission)
    borrowed = MagicMock()
    local_run._give_back(borrowed)
    assert borrowed.give_back.called == given_back


def test_a_run_that_should_stop_is_cancelled_and_the_others_go_on(
    make_runs: Callable[..., LocalRun],
    submissions: Callable[..., Submission],
    database: Store,
    context: ContextSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, good = submissions(context, "low"), submissions(context, "good")
    store_outcomes(database, low, 64, mass=0.0006, of=1_000)
    store_outcomes(database, good, 2)
    local_run = make_runs(low, good)
    sends(local_run, monkeypatch, nothing)
    local_run._watch([low, good], [], collector(), load_settings())
    assert not local_run.failures
    status = run_status(database, low.run.run_id)
    assert status is not None and status.cancelled
    status = run_status(database, good.run.run_id)
    assert status is not None and not status.cancelled


@pytest.mark.parametrize(
    ("settings", "lent", "temporary", "shown"),
    [
        ({}, True, False, None),
        ({}, False, True, "stopping the engine and RabbitMQ"),
        ({}, False, False, "stopping RabbitMQ"),
        ({"broker_url": "amqp://broker/"}, False, True, "stopping the engine"),
        ({"broker_url": "amqp://broker/"}, False, False, None),
    ],
    ids=["the keeper's", "its own", "its own broker", "its own keeper", "the user's broker"],
)
def test_the_end_of_a_run_names_what_it_stops_and_nothing_that_stays(
    settings: dict[str, object],
    lent: bool,
    temporary: bool,
    shown: str | None,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = MagicMock(url="amqp://keepwarm@127.0.0.1:1/", password="secret")
    module = "services.local.local_run"
    monkeypatch.setattr(f"{module}.borrow_broker", lambda *_: broker if lent else None)
    monkeypatch.setattr(f"{module}.PrivateNode", lambda *_: broker)
    monkeypatch.setattr(f"{module}.temporary_keeper", lambda *_: nullcontext(temporary))
    run = make_run(**settings)
    monkeypatch.setattr(run, "_check_broker", lambda: None)
    with ExitStack() as services:
        run._start_broker(services)
        assert run._last_phase() == shown
