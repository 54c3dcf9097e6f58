"""The lines of a file, each of bounded length."""

import codecs
from collections.abc import Iterator
from typing import IO, NamedTuple

from services.contracts.bounds import MAX_LINE_BYTES


class TextLine(NamedTuple):
    """A line of the file, numbered from 1. A line over the bound is cut, has a `fault`, and its
    quotes are counted.
    """

    number: int
    content: bytes
    fault: str | None = None
    quotes: int = 0


def bounded_lines(file: IO[bytes]) -> Iterator[TextLine]:
    """Lines with their numbers; a line over the bound is cut, and never completely in memory.

    Byte order marks are left out, which spreadsheets and Windows write at the start of each file.
    """
    file.seek(0)
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield TextLine(number, line.removeprefix(codecs.BOM_UTF8))
            continue
        start, quotes = line[:1_000], line.count(b'"')
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
            quotes += line.count(b'"')
        fault = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
        yield TextLine(number, start, fault, quotes)
