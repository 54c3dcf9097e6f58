"""What `keepwarm run` shows: a progress bar on a terminal, a line every few seconds elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn
from rich.status import Status
from rich.text import Text

from services.cli.label_mass import MassWatch
from services.cli.screen import Screen, duration, say
from services.local.worker_processes import WORKING
from services.store import RunStatus

_LINE_SECONDS = 5.0


class ShownWorker(Protocol):
    """The part of a `WorkerProcess` that is shown."""

    @property
    def state(self) -> str: ...
    @property
    def losses(self) -> int: ...
    @property
    def answered(self) -> int: ...


class _Bar(Progress):
    """The bar, and below it a note where there is one."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


class LiveView:
    """Shows how many claims are done, the speed, the time left, and what the run waits for.

    A claim counts as soon as a worker of this run has answered it. Its verdict reaches the store
    later, with the rest of its batch. Answers of other workers count when they are in the store.
    """

    def __init__(
        self, console: Screen, claims: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`claims` in the input."""
        self._console = console
        self._clock = clock
        self._claims = claims
        self._printed_at = float("-inf")
        self._line = self._last_line = ""
        self._waiting_for: str | None = None
        self._losses = -1
        self._answered_before = 0
        self._task: Task | None = None
        self._bar = _Bar(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
            get_time=clock,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._print_line()

    def renderable(self) -> RenderableType:
        """What the terminal shows now."""
        return self._bar.get_renderable()

    def show(
        self,
        status: RunStatus | None,
        workers: Sequence[ShownWorker],
        *,
        waiting_for: str | None = None,
    ) -> None:
        """Show the present state. A new `waiting_for` is printed once."""
        if waiting_for is not None and waiting_for != self._waiting_for:
            say(self._console, f"waiting: {waiting_for}")
        self._waiting_for = waiting_for
        stored = 0 if status is None else status.done + status.dead
        known = None if status is None else status.total
        total = max(stored, self._claims) if known is None else known
        done = min(total, self._answered(stored, workers))
        task = self._update_task(done, total)
        states = _states(workers)
        text = _description(task)
        if done >= total:
            text = f"{text}, storing the last verdicts"
        elif not any(worker.state == WORKING for worker in workers):
            text, states = f"{text}: {states}", ""
        self._bar.note = states
        self._bar.update(task.id, description=escape(text))
        self._line = f"{task.percentage:.0f} %: {text}" + (states and f"; {states}")
        if self._clock() - self._printed_at >= _LINE_SECONDS:
            self._print_line()

    def _answered(self, stored: int, workers: Sequence[ShownWorker]) -> int:
        """Claims done: those in the store at the start, and those that the workers have answered
        since. The store has more where workers of other processes answer too.
        """
        answered = sum(worker.answered for worker in workers)
        losses = sum(worker.losses for worker in workers)
        lost = losses != self._losses  # claims that it had not published are answered again
        if lost or stored > self._answered_before + answered:
            self._losses, self._answered_before = losses, stored - answered
        return self._answered_before + answered

    def _update_task(self, done: int, total: int) -> Task:
        if self._task is None:
            # As the start value, not as progress: claims of an earlier run must not count as speed.
            task_id = self._bar.add_task("", total=total, completed=done)
            (self._task,) = (task for task in self._bar.tasks if task.id == task_id)
        self._bar.update(self._task.id, completed=done, total=total)
        return self._task

    def _print_line(self) -> None:
        if self._line != self._last_line and not self._console.is_terminal:
            say(self._console, self._line)
            self._printed_at, self._last_line = self._clock(), self._line


def _description(task: Task) -> str:
    """Claims done and in total; claims/s and the time left where they are known."""
    text = f"{task.completed:,.0f} of {task.total or 0:,.0f} claims"
    if task.finished or not task.speed:
        return text
    left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
    return f"{text}, {task.speed:,.1f}/s{left}"


def _states(workers: Sequence[ShownWorker]) -> str:
    """The workers' states; empty when all of them are working."""
    if all(worker.state == WORKING for worker in workers):
        return ""
    if len(workers) == 1:
        return workers[0].state
    # Without details after the comma, such as seconds, which differ from worker to worker.
    states = Counter(worker.state.partition(",")[0] for worker in workers)
    listed = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{len(workers)} workers: {listed}"


class RunView:
    """Shows a run to its user: messages, its progress, and what it waits for before and after."""

    def __init__(self, console: Screen, claims: int, mass: MassWatch) -> None:
        self._console = console
        self._claims = claims
        self._mass = mass
        self._live: LiveView | None = None
        self._spinner: Status | None = None

    def message(self, text: str) -> None:
        say(self._console, text)

    def phase(self, text: str | None) -> None:
        self._close_live()
        if self._spinner is not None and text is not None:
            self._spinner.update(text)
        elif text is not None:
            self._spinner = self._console.status(text)
            self._spinner.start()
        elif self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def progress(
        self,
        status: RunStatus | None,
        workers: Sequence[ShownWorker],
        *,
        waiting_for: str | None,
    ) -> None:
        if self._live is None:
            self._live = LiveView(self._console, self._claims).__enter__()
        self._live.show(status, workers, waiting_for=waiting_for)

    def workers_stopping(self, *, interrupted: bool) -> None:
        self._close_live()
        if interrupted:
            self.message("Stopping: workers publish what they have finished …")
        elif not self._console.is_terminal:
            self.message("Stopping the workers.")
        self.phase("waiting for the workers to stop")

    def should_stop(self, status: RunStatus | None) -> bool:
        return self._mass.should_stop(status)

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.__exit__()
            self._live = None
