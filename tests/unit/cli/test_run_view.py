"""What is shown of several runs together."""

import io
from dataclasses import dataclass

import pytest

from services.cli.label_mass import MassWatch
from services.cli.live_view import RunView
from services.cli.screen import Screen
from services.store import RunStatus
from tests.unit.cli.test_screen import but


@dataclass
class Worker:
    state: str = "working"
    answered: int = 0
    losses: int = 0


def of(run_id: str, done: int, **changes: object) -> RunStatus:
    counts = {"total": 100, "done": done, "dead": 0, "judged": done, "correct": done // 2}
    return but(run_id=run_id, complete=done == 100, **counts | changes)


@pytest.fixture
def view(screen: Screen) -> RunView:
    names = {"run-1": "few-shot", "run-2": "zero-shot", "run-3": "letters"}
    watches = {run_id: MassWatch(screen, allowed=False) for run_id in names}
    return RunView(screen, 300, watches, names)


def shown(view: RunView, screen: Screen, *statuses: RunStatus | None, current: str) -> list[str]:
    """What is printed of these statuses, as without a terminal, and after that a last line."""
    assert isinstance(screen.file, io.StringIO)
    before = len(screen.file.getvalue())
    by_id = {f"run-{number}": status for number, status in enumerate(statuses, 1)}
    view.progress(by_id, [Worker()], current=current, waiting_for=None)
    view.workers_stopping(interrupted=False)
    view.phase(None)
    return screen.file.getvalue()[before:].splitlines()


def test_the_progress_is_that_of_all_runs_and_names_the_one_that_is_computed(
    view: RunView, screen: Screen
) -> None:
    lines = shown(view, screen, of("run-1", 100), of("run-2", 20), None, current="run-2")
    assert lines[0] == "40 %: 120 of 300 claims; zero-shot: 20 of 100"
    later = shown(
        view, screen, of("run-1", 100), of("run-2", 20, total=None), None, current="run-2"
    )
    assert later[0] == "40 %: 120 of 300 claims; zero-shot: 20"


def test_a_run_that_becomes_complete_has_a_line_and_one_that_was_has_none(
    view: RunView, screen: Screen
) -> None:
    first = shown(view, screen, of("run-1", 100), of("run-2", 20), None, current="run-2")
    assert not any(line.startswith("few-shot: ") for line in first)
    second = shown(
        view, screen, of("run-1", 100), of("run-2", 100, dead=3), of("run-3", 1), current="run-3"
    )
    assert second[0] == "zero-shot: 103 claims, accuracy 0.500, 3 failed"
    third = shown(view, screen, of("run-1", 100), of("run-2", 100), of("run-3", 2), current="run-3")
    assert not any(line.startswith("zero-shot: ") for line in third)


def test_a_single_run_has_no_name(screen: Screen) -> None:
    view = RunView(screen, 100, {"run-1": MassWatch(screen, allowed=False)})
    (line, *_) = shown(view, screen, of("run-1", 20), current="run-1")
    assert line == "20 %: 20 of 100 claims"
