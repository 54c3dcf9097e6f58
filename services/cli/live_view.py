"""What `keepwarm run` and `sweep` show: a progress bar on a terminal, a line every few seconds
elsewhere.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn
from rich.status import Status
from rich.text import Text

from services.cli.label_mass import MassWatch
from services.cli.screen import Screen, duration, plural, say
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


class ShownCounts(Protocol):
    """The part of a `RunStatus` that is shown."""

    @property
    def done(self) -> int: ...
    @property
    def dead(self) -> int: ...
    @property
    def total(self) -> int | None: ...


@dataclass(frozen=True)
class _Sum:
    """The counts of several runs. The total is None until each of them has one."""

    done: int
    dead: int
    total: int | None

    @classmethod
    def of(cls, statuses: Collection[RunStatus | None]) -> Self:
        known = [status for status in statuses if status is not None]
        totals = [None if status is None else status.total for status in statuses]
        return cls(
            done=sum(status.done for status in known),
            dead=sum(status.dead for status in known),
            total=None if None in totals else sum(filter(None, totals)),
        )


class _Bar(Progress):
    """The bar, and below it notes where there are some."""

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
        status: ShownCounts | None,
        workers: Sequence[ShownWorker],
        *,
        waiting_for: str | None = None,
        note: str = "",
    ) -> None:
        """Show the present state, and the `note`. A new `waiting_for` is printed once."""
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
        notes = [each for each in (states, note) if each]
        self._bar.note = "\n".join(notes)
        self._bar.update(task.id, description=escape(text))
        self._line = "; ".join([f"{task.percentage:.0f} %: {text}", *notes])
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
    """Shows runs to their user: messages, their progress, and what they wait for before and after.

    Of several runs, the progress is that of all together, with a line for each that is complete.
    """

    def __init__(
        self,
        console: Screen,
        claims: int,
        masses: Mapping[str, MassWatch],
        names: Mapping[str, str] | None = None,
    ) -> None:
        """`claims` of all runs together. `masses` by run id. `names` of runs, if there are
        several, by run id.
        """
        self._console = console
        self._claims = claims
        self._masses = masses
        self._names = names or {}
        self._complete: Mapping[str, RunStatus] | None = None
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
        statuses: Mapping[str, RunStatus | None],
        workers: Sequence[ShownWorker],
        *,
        current: str | None,
        waiting_for: str | None,
    ) -> None:
        if self._live is None:
            self.phase(None)
            self._live = LiveView(self._console, self._claims).__enter__()
        self._say_complete(statuses)
        self._live.show(
            _Sum.of(statuses.values()),
            workers,
            waiting_for=waiting_for,
            note=self._note(statuses.get(current or "")),
        )

    def workers_stopping(self, *, interrupted: bool) -> None:
        self._close_live()
        if interrupted:
            self.message("Stopping: workers publish what they have finished …")
        elif not self._console.is_terminal:
            self.message("Stopping the workers.")
        self.phase("waiting for the workers to stop")

    def should_stop(self, status: RunStatus | None) -> bool:
        return status is not None and self._masses[status.run_id].should_stop(status)

    def _say_complete(self, statuses: Mapping[str, RunStatus | None]) -> None:
        """A line for each named run that has become complete since the first call."""
        complete = {
            run_id: status
            for run_id, status in statuses.items()
            if status is not None and status.complete
        }
        before = complete if self._complete is None else self._complete
        for run_id, name in self._names.items():
            if run_id in complete and run_id not in before:
                self.message(f"{name}: {_result(complete[run_id])}")
        self._complete = complete

    def _note(self, status: RunStatus | None) -> str:
        """The progress of one run of several."""
        if status is None or status.run_id not in self._names:
            return ""
        of_total = "" if status.total is None else f" of {status.total:,}"
        return f"{self._names[status.run_id]}: {status.done + status.dead:,}{of_total}"

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.__exit__()
            self._live = None


def _result(status: RunStatus) -> str:
    """`240 claims, accuracy 0.367`, and how many claims failed."""
    parts = [plural(status.done + status.dead, "claim")]
    if status.judged:
        parts.append(f"accuracy {status.correct / status.judged:.3f}")
    if status.dead:
        parts.append(f"{status.dead:,} failed")
    return ", ".join(parts)
