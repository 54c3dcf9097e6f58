"""Makes standard output and error safe from the locale's encoding and from a lost terminal."""

import codecs
import errno
import io
import locale
import os
import signal
import sys
from pathlib import Path
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


class _Error(io.FileIO):
    """Standard error. What cannot be written is discarded: there is nowhere to report it, and a
    full disk must not change the exit code. From Python 3.13 on it would, at the process's end.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


class _Output(io.FileIO):
    """Standard output that is no terminal. If the reader of a pipe is gone, the command ends with
    the exit code that a shell reports for SIGPIPE.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            with Path(os.devnull).open("wb") as nowhere:  # for what is written until the end
                os.dup2(nowhere.fileno(), self.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None


def make_robust() -> None:
    """Escape characters that the terminal cannot encode; write UTF-8 to files and pipes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # closed, or replaced by a test
        if stream is sys.__stderr__:
            raw: io.FileIO = _Error(stream.fileno(), "w", closefd=False)
        elif stream.isatty():
            raw = _Terminal(stream.fileno(), "w", closefd=False)
        elif stream is sys.__stdout__:
            raw = _Output(stream.fileno(), "w", closefd=False)
        else:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            continue
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(raw),
                _terminal_encoding() if stream.isatty() else "utf-8",
                errors="backslashreplace",
                line_buffering=stream.isatty() or name == "stderr",
            ),
        )


def _terminal_encoding() -> str:
    """The encoding of the locale, although this process is in Python's UTF-8 mode. A locale without
    one, such as C, means UTF-8, as for Python.
    """
    encoding = locale.getencoding()
    return "utf-8" if codecs.lookup(encoding).name == "ascii" else encoding
