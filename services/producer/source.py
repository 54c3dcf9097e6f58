"""A file of claims: found, kept still, counted, and read line by line in constant memory."""

import codecs
import csv
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self

from services.contracts.bounds import MAX_LINE_BYTES
from services.contracts.errors import InputError

Format = Literal["jsonl", "csv"]
STANDARD_INPUT = "-"

_SURVEY_EVERY = 100_000


@dataclass(frozen=True, slots=True)
class Line:
    """One record as it stands in the file.

    `number` is the line in the file, from 1 (for CSV, the line on which the record ends);
    `position` counts records from 0. `content` is a JSON text, or a CSV record's fields by column;
    `fault` says why it could not even be read.
    """

    number: int
    position: int
    content: bytes | Mapping[str, str]
    fault: str | None = None


@dataclass(frozen=True)
class Survey:
    """A file's content in short: how many records, and which (BLAKE2b over all bytes)."""

    lines: int
    digest: str


class Source:
    """A file that can be read twice: first surveyed, then sent.

    Standard input is copied to a temporary file, for a run's identity depends on all of it. Use as
    a context manager.
    """

    def __init__(self, file: IO[bytes], name: str, format: Format) -> None:
        self._file = file
        self.name = name
        self.format = format

    @classmethod
    def open(cls, path: str, format: Format | None = None) -> Self:
        """Raises InputError that names the file and the next step."""
        if path == STANDARD_INPUT:
            name = "standard input"
            return cls(_spooled(sys.stdin.buffer, name), name, format or "jsonl")
        try:
            file: IO[bytes] = Path(path).open("rb")  # noqa: SIM115  (closed by __exit__)
        except IsADirectoryError as error:
            raise InputError(f"{path} is a directory; name a file of claims in it") from error
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist; check the path") from error
        except PermissionError as error:
            raise InputError(
                f"{path} may not be read by this user; see `ls -l` and chmod"
            ) from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        # A name that is not UTF-8 can be opened, but not written into a message.
        name = path.encode(errors="replace").decode()
        if not file.seekable():
            with file as stream:
                file = _spooled(stream, name)
        guessed: Format = "csv" if Path(path).suffix.lower() == ".csv" else "jsonl"
        return cls(file, name, format or guessed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def survey(self, on_lines: Callable[[int], None] = lambda _: None) -> Survey:
        """Read it through. `on_lines` hears how many records were read so far.

        Raises InputError when there is nothing in it.
        """
        self._file.seek(0)
        digest = hashlib.blake2b(digest_size=16)
        while chunk := self._file.read(1 << 20):
            digest.update(chunk)
        lines = 0
        for line in self.lines():
            lines = line.position + 1
            if lines % _SURVEY_EVERY == 0:
                on_lines(lines)
        if not lines:
            raise InputError(f"{self.name} is empty; it must hold one claim a line")
        on_lines(lines)
        return Survey(lines, digest.hexdigest())

    def lines(self) -> Iterator[Line]:
        """Every record, in order. Blank lines are not records."""
        return self._csv_lines() if self.format == "csv" else self._json_lines()

    def columns(self) -> list[str]:
        """The header of a CSV file."""
        return next(_rows(self._file), (0, [], None))[1]

    def _json_lines(self) -> Iterator[Line]:
        position = 0
        for number, content, fault, _ in _bounded_lines(self._file):
            if fault is not None or not content.isspace():
                yield Line(number, position, content, fault)
                position += 1

    def _csv_lines(self) -> Iterator[Line]:
        rows = _rows(self._file)
        header = next(rows, (0, [], None))[1]
        for position, (number, row, fault) in enumerate(rows):
            if fault is None and len(row) != len(header):
                fault = f"it has {len(row)} fields; the header has {len(header)}"
            yield Line(number, position, dict(zip(header, row, strict=False)), fault)


def _spooled(stream: IO[bytes], name: str) -> IO[bytes]:
    """All of a stream in a temporary file that has no name and so cannot stay behind."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    try:
        shutil.copyfileobj(stream, spool, 1 << 20)
    except OSError as error:
        spool.close()
        raise InputError(
            f"{name} cannot be kept in {tempfile.gettempdir()}: {error.strerror}; make "
            "room, or set TMPDIR to a directory with more"
        ) from error
    return spool


class _Physical(NamedTuple):
    """A line as it stands in the file; `quotes` are counted only in one over the bound."""

    number: int
    content: bytes
    fault: str | None = None
    quotes: int = 0


def _bounded_lines(file: IO[bytes]) -> Iterator[_Physical]:
    """Lines with their numbers; a line over the bound is skipped without being held in memory."""
    file.seek(0)
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # spreadsheets and Windows write one
        file.seek(0)
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield _Physical(number, line)
            continue
        start, quotes = line[:1_000], line.count(b'"')
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
            quotes += line.count(b'"')
        fault = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
        yield _Physical(number, start, fault, quotes)


def _rows(file: IO[bytes]) -> Iterator[tuple[int, list[str], str | None]]:
    """CSV records with the number of their last line and, for a broken one, what is wrong."""
    bad_lines: list[str] = []

    def texts() -> Iterator[str]:
        for number, content, fault, quotes in _bounded_lines(file):
            if fault is not None:
                bad_lines.append(f"line {number}: {fault}")
                # In its place a field of the same kind: it opens or closes a quote, or neither.
                content = b'"\n' if quotes % 2 else b"x\n"
            # What is not UTF-8 becomes lone surrogates; the parser of claims refuses them.
            yield content.decode("utf-8", errors="surrogateescape")

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(texts(), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad_lines.clear()
            yield reader.line_num, [], str(error)
            continue
        if row:
            fault = bad_lines.pop() if bad_lines else None
            bad_lines.clear()
            yield reader.line_num, row, fault
