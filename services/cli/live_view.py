"""The live progress of `keepwarm run`: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from services.cli.screen import duration
from services.collector import RunStatus
from services.producer import Progress as Published

_LINE_SECONDS = 5.0


class LiveView:
    """Shows claims done, rate, time left and what each worker's engine does."""

    def __init__(self, console: Console, lines: int) -> None:
        self._console = console
        self._lines = lines
        self._printed_at = 0.0
        self._last_line = ""
        self._told: str | None = None
        self._bar = Progress(
            TextColumn("verdicts"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=lines)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(
        self,
        status: RunStatus | None,
        published: Published,
        worker_states: Sequence[str],
        *,
        waiting_for: str | None = None,
    ) -> None:
        """Draw the present state; say once what the collector has to wait for, if it has to."""
        if waiting_for is not None and waiting_for != self._told:
            self._console.print(f"waiting: {waiting_for}", highlight=False, markup=False)
        self._told = waiting_for
        done = 0 if status is None else status.done + status.dead
        # Until all is sent, the lines read are the best guess of how many claims there are.
        total = self._lines - published.rejected
        if status is not None and status.total is not None:
            total = status.total
        rate = 0.0 if status is None else status.claims_per_second
        left = duration((total - done) / rate) if rate else "unknown"
        engines = ", ".join(worker_states)
        text = f"{done:,} of {total:,}, {rate:,.1f} claims/s, {left} left; engine: {engines}"
        self._bar.update(self._task, completed=done, total=total, description=text)
        if not self._console.is_terminal:
            self._print_line(text)

    def _print_line(self, text: str) -> None:
        now = time.monotonic()
        if text != self._last_line and now - self._printed_at >= _LINE_SECONDS:
            self._console.print(text, highlight=False, soft_wrap=True)
            self._printed_at, self._last_line = now, text
