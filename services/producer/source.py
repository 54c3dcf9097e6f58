"""The records of a file of claims, read one by one in constant memory."""

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, Self

from pydantic_core import from_json

from services.contracts.errors import InputError
from services.producer.dataset_formats import columns_without_header
from services.producer.delimited import Dialect, delimited_rows, find_dialect
from services.producer.fields import CLAIM_NAMES, is_header, normalized
from services.producer.files import (
    SAMPLE_BYTES,
    STANDARD_INPUT,
    TABLE_MARKS,
    as_utf8,
    bounded_lines,
    dataset_files,
    decompressed,
    encoding_of,
    open_file,
)
from services.producer.json_values import json_values
from services.producer.tables import table_rows

Container = Literal["jsonl", "json", "csv", "parquet", "arrow"]
"""How records are kept in a file. `csv` is all delimited text; `json` is an array, or objects that
span lines."""

_Read = tuple[int, bytes | Mapping[str, Any], str | None]
"""A record without its position: `line`, `content` and `fault`."""

_PROGRESS_RECORDS = 100_000
_MAX_MERGED = 1_000


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the file.

    `line` is its line in the file, from 1 (of delimited text the line on which it ends, of a JSON
    array the line on which it begins, of Parquet and Arrow the row). `position` counts records from
    0. `content` is a JSON text, or the values by column. `fault` is the reason why it could not be
    read.
    """

    line: int
    position: int
    content: bytes | Mapping[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class FileSummary:
    """The number of records in a file, before merging (`rows`) and after, and its digest (BLAKE2b
    over all bytes).
    """

    rows: int
    records: int
    digest: str


class Source:
    """A file of records, or a directory of such files; it can be read more than once. Its first
    bytes determine its container; its name decides only when they do not.

    Compressed files are decompressed while they are read. Standard input is copied to a temporary
    file, because a run's identity depends on all of it. Use as a context manager.
    """

    def __init__(
        self,
        files: Sequence[IO[bytes]],
        name: str,
        container: Container | None = None,
        *,
        names: Sequence[str] = (),
        claim_column: str | None = None,
        encoding: str | None = None,
    ) -> None:
        """`names` are those of the files, if there are several. `encoding` is the encoding of the
        text; UTF-8, UTF-16 and UTF-32 are recognised. `claim_column` is the column or key of the
        claim, when it is not a known one; a number counts the columns of delimited text without a
        header.

        Raises InputError when delimited text has no such column.
        """
        self.name = name
        self._names = list(names) or [name]
        containers = {container or _container(file, name) for file in files}
        if len(containers) > 1:
            raise InputError(
                f"{name} has files of several kinds ({', '.join(sorted(containers))}); name one of "
                "them, or keep those of one kind in it"
            )
        self.container: Container = containers.pop()
        self._files = [
            file if self.container in ("parquet", "arrow") else as_utf8(file, name, encoding)
            for file in files
        ]
        self._claim_column = claim_column
        self.same_claim: Callable[[Mapping[str, Any]], object] | None = None
        """Adjacent records for which this returns the same value are merged into one, with all of
        them as its `rows`. A record for which it returns None stays by itself."""
        self._dialects: list[Dialect] = []
        if self.container == "csv":
            try:
                self._dialects = [
                    find_dialect(
                        file,
                        its_name,
                        names_claim=self._names_claim,
                        unnamed=self._columns_by_number,
                    )
                    for file, its_name in zip(self._files, self._names, strict=True)
                ]
                self._require_same_columns()
            except InputError:
                self.close()
                raise

    @classmethod
    def open(
        cls,
        path: str,
        container: Container | None = None,
        *,
        claim_column: str | None = None,
        encoding: str | None = None,
        split: str | None = None,
    ) -> Self:
        """A file, a directory of Parquet or Arrow files or of Spark's, or `-` for standard input.

        Raises InputError that names the file and the next step.
        """
        with ExitStack() as held:
            if path != STANDARD_INPUT and Path(path).is_dir():
                opened = [open_file(str(file)) for file in dataset_files(Path(path), split)]
                name = path.encode(errors="replace").decode()
            else:
                opened = [open_file(path)]
                if split is not None:
                    opened[0][0].close()
                    raise InputError(
                        f"{path} is a file: --split chooses among the Parquet or Arrow files of a "
                        "directory; leave it out"
                    )
                name = opened[0][1]
            for file, _ in opened:
                held.callback(file.close)
            files = [(decompressed(file, its_name), its_name) for file, its_name in opened]
            if len(files) > 1:  # Spark writes empty files as well
                for empty in [pair for pair in files if _is_empty(pair[0])][: len(files) - 1]:
                    files.remove(empty)
                    empty[0].close()
            source = cls(
                [file for file, _ in files],
                name,
                container,
                names=[its_name for _, its_name in files],
                claim_column=claim_column,
                encoding=encoding,
            )
            held.pop_all()
            return source

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns of delimited text; None for other containers."""
        return self._dialects[0].columns if self._dialects else None

    @property
    def delimiter(self) -> str | None:
        """The delimiter of delimited text; None for other containers."""
        return self._dialects[0].delimiter if self._dialects else None

    @property
    def has_header(self) -> bool:
        """Whether the columns are named in the file."""
        return not self._dialects or self._dialects[0].header

    def summarize(self, on_records: Callable[[int], None] = lambda _: None) -> FileSummary:
        """Read the whole file. `on_records` is called with the number of records read so far.

        Raises InputError when the file is empty.
        """
        digest = hashlib.blake2b(digest_size=16)
        for file in self._files:
            file.seek(0)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        count = rows = 0
        for count, record in enumerate(self.records(), 1):
            fields = record.content if self.same_claim is not None else b""
            rows += len(fields["rows"]) if isinstance(fields, Mapping) else 1
            if count % _PROGRESS_RECORDS == 0:
                on_records(count)
        if not count:
            raise InputError(f"{self.name} is empty; it must have one claim per line")
        on_records(count)
        return FileSummary(rows, count, digest.hexdigest())

    def records(self) -> Iterator[Record]:
        """Every record, in order. Blank lines are not records."""
        read = self._read() if self.same_claim is None else self._merged(self.same_claim)
        for position, (line, content, fault) in enumerate(read):
            yield Record(line, position, content, fault)

    def first_records(self, count: int) -> list[Mapping[str, Any]]:
        """The first records that can be read, to recognise their format."""
        sample = islice(self._read(), 4 * count)
        found = (as_object(content) for _, content, fault in sample if fault is None)
        return [record for record in found if record is not None][:count]

    def _merged(self, same_claim: Callable[[Mapping[str, Any]], object]) -> Iterator[_Read]:
        group: list[Mapping[str, Any]] = []
        group_claim: object = None
        first = 0
        for number, content, fault in self._read():
            row = as_object(content) if fault is None else None
            claim = None if row is None else same_claim(row)
            same = claim is not None and claim == group_claim
            if group and not (same and len(group) < _MAX_MERGED):
                yield first, {**group[0], "rows": group}, None
                group = []
            if row is None:
                yield number, content, fault
            else:
                first = first if group else number
                group_claim = claim
                group.append(row)
        if group:
            yield first, {**group[0], "rows": group}, None

    def _read(self) -> Iterator[_Read]:
        """The records of all files; their lines are counted as if they were one."""
        if len(self._files) == 1:
            yield from self._read_file(0)
            return
        before = 0
        for index in range(len(self._files)):
            number = 0
            for number, content, fault in self._read_file(index):
                yield before + number, content, fault
            before += number

    def _read_file(self, index: int) -> Iterator[_Read]:
        file = self._files[index]
        if self._dialects:
            names = self._dialects[index].columns
            for number, fields, fault, text in delimited_rows(file, self._dialects[index]):
                if fault is not None and not fields:
                    yield number, text.encode(errors="surrogateescape"), fault
                    continue
                pairs = zip(names, fields, strict=False)
                yield number, {name: field for name, field in pairs if name}, fault
        elif self.container == "json":
            for number, value in json_values(file, self._names[index]):
                yield number, value, None
        elif self.container == "jsonl":
            for number, content, fault, _ in bounded_lines(file):
                if fault is not None or content.strip():
                    yield number, content, fault
        else:
            for number, row in enumerate(table_rows(file, self._names[index], self.container), 1):
                yield number, row, None

    def _require_same_columns(self) -> None:
        first = self._dialects[0]
        for name, dialect in zip(self._names, self._dialects, strict=True):
            if (dialect.columns, dialect.header) != (first.columns, first.header):
                raise InputError(
                    f"{name} has other columns ({', '.join(map(repr, dialect.columns))}) than "
                    f"{self._names[0]} ({', '.join(map(repr, first.columns))}); read each by itself"
                )

    def _names_claim(self, header: Collection[str]) -> bool:
        column = self._claim_column
        if column is not None:
            # A number may be a value of the first record too; pandas writes a header of numbers.
            if column.isdecimal() and not is_header([*header]):
                return column in header and all(map(str.isdecimal, header))
            return normalized(column) in map(normalized, header)
        return any(normalized(column) in CLAIM_NAMES for column in header)

    def _columns_by_number(self, fields: Sequence[str]) -> Sequence[str] | None:
        """The columns of a file without a header; None when they are not known."""
        column = self._claim_column
        if column is None:
            return columns_without_header(fields)
        if not column.isdecimal() or not 1 <= int(column) <= len(fields):
            return None
        if is_header(fields):
            raise InputError(
                f"{self.name}: its first record is a header: "
                f"{', '.join(map(repr, fields[:20]))}. Name the columns instead of numbering them: "
                f"--column claim={fields[int(column) - 1].strip()!r}"
            )
        return [str(number) for number in range(1, len(fields) + 1)]


def as_object(content: bytes | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A record's values by name; None when it is not a JSON object."""
    if isinstance(content, Mapping):
        return content
    try:
        value = from_json(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_empty(file: IO[bytes]) -> bool:
    empty = not file.read(1)
    file.seek(0)
    return empty


def _container(file: IO[bytes], name: str) -> Container:
    """The container, by the file's first bytes; its name decides only when they are ambiguous."""
    file.seek(0)
    sample = file.read(SAMPLE_BYTES)
    file.seek(0)
    if sample.startswith(TABLE_MARKS):
        return "parquet" if sample.startswith(TABLE_MARKS[0]) else "arrow"
    if encoding := encoding_of(sample):
        sample = sample.decode(encoding, "replace").encode()
    sample = sample.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n")
    first, _, rest = sample.lstrip().partition(b"\n")
    first = first.strip()
    if first.startswith(b"["):
        # One list per line is JSONL without claims; one array may also be on a single line.
        return "jsonl" if _is_json(first) and rest.lstrip().startswith(b"[") else "json"
    if first.startswith(b"{"):
        spans_lines = first.endswith((b"{", b"[", b",")) and not _is_json(first)
        return "json" if spans_lines else "jsonl"
    lines = sample.split(b"\n")
    if not sample.strip() or any(line.lstrip().startswith(b"{") for line in lines):
        return "jsonl"  # with broken first lines
    return "jsonl" if Path(name).suffix.lower() in (".jsonl", ".ndjson") else "csv"


def _is_json(text: bytes) -> bool:
    try:
        from_json(text)
    except ValueError:
        return False
    return True


def sample_records(
    records: Iterator[Record], total: int, limit: int | None, seed: int | None
) -> Iterator[Record]:
    """`limit` of `total` records: the first ones, or with a `seed` a uniform sample without
    replacement (selection sampling: Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S).
    """
    wanted = total if limit is None else min(limit, total)
    draw = random.Random(seed) if seed is not None else None
    for record in records:
        if wanted == 0:
            return
        left = total - record.position
        if draw is None or draw.random() * left < wanted:
            wanted -= 1
            yield record
