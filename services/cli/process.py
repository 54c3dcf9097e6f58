"""Prepares the process of a command: its imports, streams, user and garbage collector."""

import codecs
import gc
import io
import locale
import os
import pwd
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_GARBAGE_THRESHOLD = 200_000


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """In this context `modules` are not importable, for libraries to which they are optional. A
    worker must start within a second, on CPUs that its engine may be using.
    """
    hidden = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in modules
    }
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]  # None: not importable
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)


class _Discarding(io.FileIO):
    """A stream that discards what it cannot write. A terminal may be lost, and the command can
    still write results to files. For standard error there is nowhere to report it, and a full disk
    must not change the exit code; from Python 3.13 on it would, at the process's end.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


class _FileOrPipe(io.FileIO):
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


def make_streams_robust() -> None:
    """Make standard output and error safe from the locale's encoding and from a lost terminal:
    escape characters that the terminal cannot encode; write UTF-8 to files and pipes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # closed, or replaced by a test
        if stream is sys.__stderr__ or stream.isatty():
            raw: io.FileIO = _Discarding(stream.fileno(), "w", closefd=False)
        elif stream is sys.__stdout__:
            raw = _FileOrPipe(stream.fileno(), "w", closefd=False)
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


def name_the_user() -> None:
    """Set LOGNAME and HOME when the user has no line in passwd, as in a container that was started
    with `--user 12345`. torch needs the name (getpass), Hugging Face's hub the home directory.

    Raises UsageError when another user owns the substitute for the home directory.
    """
    try:
        Path.home()
    except RuntimeError:
        from services.contracts.settings import private_tmp
        from services.node.runtime_dir import open_private_dir

        os.environ["HOME"] = str(open_private_dir(private_tmp(), "HOME"))
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"uid-{os.geteuid()}")


def expect_many_small_objects() -> None:
    """Collect cyclic garbage less often. A transaction's verdicts are tens of thousands of objects
    without cycles, and searching them took half of their decoding time (measured).

    Not for the worker: an HTTP client's requests are cycles, and would accumulate.
    """
    gc.set_threshold(_GARBAGE_THRESHOLD)
