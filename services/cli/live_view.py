"""The live progress of `keepwarm run`: a bar on a terminal, a line now and then elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from services.cli.screen import Screen, duration, say
from services.cli.worker_processes import WORKING
from services.producer import Progress as Published
from services.store import RunStatus

_LINE_SECONDS = 5.0


class ShownWorker(Protocol):
    """What is shown of a worker; `WorkerProcess` is one."""

    @property
    def state(self) -> str: ...
    @property
    def losses(self) -> int: ...
    @property
    def answered(self) -> int: ...


class _Bar(Progress):
    """The bar, and below it a line when there is more to say."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


class LiveView:
    """Shows how many claims are done, how fast, the time left, and what is being waited for.

    A claim counts as soon as a worker of ours has answered it. Its verdict is in the store a little
    later, with the rest of its batch; what others' workers answer is seen there.
    """

    def __init__(
        self, console: Screen, lines: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`lines` of the input: the best guess of how many claims there are until all are sent."""
        self._console = console
        self._clock = clock
        self._lines = lines
        self._printed_at = float("-inf")
        self._line = self._last_line = ""
        self._told: str | None = None
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

    def drawing(self) -> RenderableType:
        """What is on the terminal now."""
        return self._bar.get_renderable()

    def show(
        self,
        status: RunStatus | None,
        published: Published,
        workers: Sequence[ShownWorker],
        *,
        waiting_for: str | None = None,
    ) -> None:
        """Draw the present state; say once what the collector has to wait for, if it has to."""
        if waiting_for is not None and waiting_for != self._told:
            say(self._console, f"waiting: {waiting_for}")
        self._told = waiting_for
        stored = 0 if status is None else status.done + status.dead
        total = max(stored, self._lines - published.rejected)
        if status is not None and status.total is not None:
            total = status.total
        done = min(total, self._answered(stored, workers))
        task = self._moved(done, total)
        states = _states(workers)
        text = _counted(task)
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
        """Claims done: those in the store when we began, and what the workers have answered since.
        More are in the store where others answer, too.
        """
        answered = sum(worker.answered for worker in workers)
        losses = sum(worker.losses for worker in workers)
        lost = losses != self._losses  # what a lost worker had not published is answered again
        if lost or stored > self._answered_before + answered:
            self._losses, self._answered_before = losses, stored - answered
        return self._answered_before + answered

    def _moved(self, done: int, total: int) -> Task:
        if self._task is None:
            # As the beginning, and not as progress: what is done already says nothing of our speed.
            task_id = self._bar.add_task("", total=total, completed=done)
            (self._task,) = (task for task in self._bar.tasks if task.id == task_id)
        self._bar.update(self._task.id, completed=done, total=total)
        return self._task

    def _print_line(self) -> None:
        if self._line != self._last_line and not self._console.is_terminal:
            say(self._console, self._line)
            self._printed_at, self._last_line = self._clock(), self._line


def _counted(task: Task) -> str:
    """As far as it is known: how many of how many, claims/s, and the time left."""
    text = f"{task.completed:,.0f} of {task.total or 0:,.0f} claims"
    if task.finished or not task.speed:
        return text
    left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
    return f"{text}, {task.speed:,.1f}/s{left}"


def _states(workers: Sequence[ShownWorker]) -> str:
    """What the workers do; nothing where all of them work."""
    if all(worker.state == WORKING for worker in workers):
        return ""
    if len(workers) == 1:
        return workers[0].state
    # Without details, such as how long: they differ from worker to worker.
    states = Counter(worker.state.partition(",")[0] for worker in workers)
    listed = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{len(workers)} workers: {listed}"
