"""Standard output and error that a locale or a lost terminal cannot turn into a traceback."""

import codecs
import errno
import io
import locale
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
                terminal, _terminal_encoding(), errors="backslashreplace", line_buffering=True
            ),
        )


def _terminal_encoding() -> str:
    """That of the locale; this process itself is in Python's UTF-8 mode. A locale without an
    encoding, such as C, counts as UTF-8, as for Python.
    """
    encoding = locale.getencoding()
    return "utf-8" if codecs.lookup(encoding).name == "ascii" else encoding
