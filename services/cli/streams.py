"""Standard output and error that a locale or a lost terminal cannot turn into a traceback."""

import errno
import io
import sys
from typing import Any


class _Terminal(io.FileIO):
    """A terminal that may be lost. What is written to it then goes nowhere: results are still to be
    written to their files.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def make_robust() -> None:
    """Show what a terminal's encoding lacks as escapes; write UTF-8 to files and pipes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # it is closed, or a test's
        if not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            continue
        terminal = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                terminal, stream.encoding, errors="backslashreplace", line_buffering=True
            ),
        )
