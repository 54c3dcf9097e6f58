"""Makes standard output and error safe from the locale's encoding and from a lost terminal."""

import codecs
import errno
import io
import locale
import sys
from typing import Any


class _Terminal(io.FileIO):
    """A terminal that may be lost. Output is then discarded, so that the command can still write
    results to files.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def make_robust() -> None:
    """Escape characters that the terminal cannot encode; write UTF-8 to files and pipes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # closed, or replaced by a test
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
    """The encoding of the locale, although this process is in Python's UTF-8 mode. A locale without
    one, such as C, means UTF-8, as for Python.
    """
    encoding = locale.getencoding()
    return "utf-8" if codecs.lookup(encoding).name == "ascii" else encoding
