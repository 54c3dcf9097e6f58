"""Delimited text (CSV, TSV and their relatives): its dialect, found by its header, and its records.

The dialect is not guessed from shapes. It is the one whose header has the column of the claims and
with which the fewest records of the whole file are broken (docs/decisions/0027).
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Literal, NamedTuple

from services.contracts.bounds import MAX_LINE_BYTES
from services.contracts.errors import InputError
from services.producer.files import bounded_lines

Quoting = Literal["doubled", "backslash", "none", "none-backslash"]
"""How a delimiter or a quote inside a field is written.

`doubled`: a quote is written twice; `backslash`: with a backslash before it (Spark, BigQuery);
`none`: quotes are characters like others; `none-backslash`: the same, and a backslash with t, n, N
or another after it stands for a tab, a line end, nothing or that other (MySQL, PostgreSQL).
"""

_DELIMITERS = (",", "\t", ";", "|")
_SAMPLE_RECORDS = 200
# Lines of a text may contain this many delimiters as well.
_MOST_BY_CHANCE = 2
_BINARY_SAMPLE_BYTES = 4096
# Not white space and the escape character, which text may contain.
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
# The csv module would remove the backslash and leave an N.
_NULL = re.compile(r"(?:(?<=[,;|\t])|^)\\N(?=[,;|\t\r\n]|$)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": ""}

Columns = Callable[[Sequence[str]], Sequence[str] | None]
"""For the fields of a file's first record: the names of the columns where they are known without a
header (a data set's format, columns given by number), or None."""


@dataclass(frozen=True)
class Dialect:
    """How a file's records are read.

    `columns` are their names, "" where a column has none. `header` says whether the first record
    holds them; else it is a claim already. `first_line` is where the first record begins.
    """

    delimiter: str
    quoting: Quoting = "doubled"
    columns: tuple[str, ...] = ()
    header: bool = True
    first_line: int = 1


class Row(NamedTuple):
    """The fields of one record, and the line on which it ends. A broken one has a `fault`; where
    its fields could not be separated, `text` is its first line.
    """

    number: int
    fields: list[str]
    fault: str | None
    text: str = ""


_NO_ROW = Row(0, [], None)


def find_dialect(
    file: IO[bytes], name: str, *, names_claim: Callable[[Sequence[str]], bool], unnamed: Columns
) -> Dialect:
    """The dialect of a file.

    `names_claim` says whether one of these column names is that of the claims. If the first record
    names none, `unnamed` may know the columns. Raises InputError when neither does.
    """
    first = next(iter(bounded_lines(file)), None)
    line = "" if first is None else first.content.decode("utf-8", errors="replace")
    separator = _SEPARATOR_LINE.fullmatch(line)
    candidates: list[Dialect] = []
    headers: list[list[str]] = []
    for delimiter in (separator[1],) if separator else _DELIMITERS:
        dialect = Dialect(delimiter, first_line=2 if separator else 1)
        fields = next(_rows(file, dialect), _NO_ROW).fields
        if not fields:  # it may have a quote after a backslash
            fields = next(_rows(file, replace(dialect, quoting="backslash")), _NO_ROW).fields
        header = [column.strip() for column in fields]
        while header and not header[-1]:
            header.pop()
        headers.append(header)
        if names_claim(header):
            candidates.append(replace(dialect, columns=tuple(header)))
        elif columns := unnamed(fields):
            candidates.append(replace(dialect, columns=tuple(columns), header=False))
    if not candidates:
        file.seek(0)
        if _CONTROL.search(file.read(_BINARY_SAMPLE_BYTES)):
            raise InputError(
                f"{name} is a binary file of a kind that is not read, or text in an encoding that "
                "is not recognised; save its claims as JSONL, CSV or Parquet, or name the encoding "
                "with --encoding"
            )
        raise InputError(_no_claim_column(name, 2 if separator else 1, max(headers, key=len)))
    # A header is better than none, and more columns than fewer: one of one column has no delimiter.
    headed = [d for d in candidates if d.header]
    if headed:
        most = max(len(d.columns) for d in headed)
        candidates = [d for d in headed if len(d.columns) == most]
    else:
        candidates.sort(key=lambda d: -len(d.columns))
    return _with_quoting(file, min(candidates, key=lambda d: _misfit(file, d, _SAMPLE_RECORDS)[0]))


def delimited_rows(file: IO[bytes], dialect: Dialect) -> Iterator[Row]:
    """Every record except the header, in order. Blank lines are not records."""
    rows = _rows(file, dialect)
    width = len(dialect.columns)
    header = next(rows, _NO_ROW).fields[:width] if dialect.header else []
    names = set(header)
    other_order: str | None = None
    for number, fields, fault, text in rows:
        fault = fault or other_order
        if fault is None and not any(map(str.strip, fields)):
            continue  # nothing but delimiters
        # Spreadsheets write delimiters for columns that are empty to the end of the sheet.
        while len(fields) > width and not fields[-1].strip():
            fields.pop()
        # Files of LIAR-PLUS leave out the last of the columns that they do not name.
        published = not dialect.header and not dialect.columns[-1].isdecimal()
        if published and len(fields) == width - 1:
            fields.append("")
        if fault is None and len(fields) != width:
            first = "header" if dialect.header else "first record"
            fault = f"it has {len(fields)} fields; the {first} has {width}"
        if fault is None and fields[0] in names:
            if fields == header:
                fault = REPEATED_HEADER
            elif sorted(fields) == sorted(header):
                fault = other_order = _OTHER_ORDER.format(number)
        yield Row(number, fields, fault, text)


def _no_claim_column(name: str, line: int, header: Sequence[str]) -> str:
    listed = ", ".join(repr(column[:60]) for column in header[:20]) or "none"
    return (
        f"{name}, line {line}: no column is called 'claim'; the columns are {listed}. Name the one "
        "that holds it with --column claim=NAME. If this line is a claim already and the file has "
        "no header, number the columns instead: --column claim=1 --column label=2"
    )


def _with_quoting(file: IO[bytes], dialect: Dialect) -> Dialect:
    """The same, with the quoting under which the fewest records are broken.

    Over the whole file: a quote escaped in another way may come late, and would make half a record
    look like a claim.
    """
    quotes = quoted = backslashes = False
    file.seek(0)
    while chunk := file.read(1 << 20):
        quotes = quotes or b'"' in chunk
        quoted = quoted or b'\t"' in chunk or b'\n"' in chunk
        backslashes = backslashes or b"\\" in chunk
    ways: list[Quoting] = ["doubled"]
    if dialect.delimiter == "\t":
        ways += ["none"] * quotes
        if backslashes:
            ways += ["backslash", "none-backslash"] if quoted else ["none-backslash"]
    elif quotes and backslashes:
        ways.append("backslash")
    candidates = [replace(dialect, quoting=way) for way in ways]
    # The first of those that are equally good.
    best = min(candidates, key=lambda candidate: _misfit(file, candidate, None))
    if "none-backslash" in ways and any("\\N" in r.fields for r in _sample(file, best)):
        return candidates[-1]  # only a database writes a field like that
    return best


def _sample(file: IO[bytes], dialect: Dialect) -> Iterator[Row]:
    return islice(delimited_rows(file, dialect), _SAMPLE_RECORDS)


def _misfit(file: IO[bytes], dialect: Dialect, most: int | None) -> tuple[int, int]:
    """How badly a dialect fits, to be minimised: the number of lines in broken records, then the
    negative number of records. If two dialects break no record, the one with fewer records joins
    lines at a stray quote.

    A record counts as broken if a line inside a field has many delimiters: a stray quote opened it.
    """
    broken = before = count = 0
    delimiters = len(dialect.columns) - 1
    for number, fields, fault, _ in islice(delimited_rows(file, dialect), most):
        inside = (line for f in fields if "\n" in f for line in f.split("\n")[1:-1])
        if fault is not None or any(
            2 * line.count(dialect.delimiter) >= delimiters > 0 for line in inside
        ):
            broken += number - before
        before = number
        count += 1
    return broken, -count


def _rows(file: IO[bytes], dialect: Dialect) -> Iterator[Row]:
    if dialect.quoting == "none-backslash":
        return _escaped_rows(file, dialect)
    return _csv_rows(file, dialect)


REPEATED_HEADER = "the header is repeated here: two files were put together"
_OTHER_ORDER = (
    "line {} repeats the header with the columns in another order: two files were put together; "
    "read them one by one"
)
_STRAY_QUOTE = (
    "a quote opens a field here that this line does not close, and the lines after it are records "
    "of their own"
)


def _csv_rows(file: IO[bytes], dialect: Dialect) -> Iterator[Row]:
    """Records by Python's csv module, with the number of their last line.

    If a stray quote joins several records to one, only its own line is rejected: the lines after it
    are read again.
    """
    bad_lines: list[str] = []
    skipped = dialect.first_line - 1
    # Of the record that is read, for another reading; a field over the csv module's bound ends it.
    lines: list[str] = []
    again: list[str] = []
    lines_of_file = islice(bounded_lines(file), skipped, None)
    read = skipped

    def texts() -> Iterator[str]:
        nonlocal read
        while True:
            if again:
                text = again.pop()
            else:
                line = next(lines_of_file, None)
                if line is None:
                    return
                number, content, fault, quotes = line
                if fault is not None:
                    bad_lines.append(f"line {number}: {fault}")
                    # In its place a field of the same kind: it opens or closes a quote, or neither.
                    content = b'"\n' if quotes % 2 else b"x\n"
                # Bytes that are not UTF-8 become lone surrogates, which the claims parser rejects.
                text = content.decode("utf-8", errors="surrogateescape")
                if dialect.quoting == "backslash":
                    text = _NULL.sub("", text)
            read += 1
            lines.append(text)
            yield text

    csv.field_size_limit(MAX_LINE_BYTES)

    def new_reader() -> Iterator[list[str]]:
        return csv.reader(
            texts(),
            delimiter=dialect.delimiter,
            quoting=csv.QUOTE_NONE if dialect.quoting == "none" else csv.QUOTE_MINIMAL,
            escapechar="\\" if dialect.quoting == "backslash" else None,
            skipinitialspace=True,  # as written by hand: 1, "two, three"
            strict=True,
        )

    reader = new_reader()
    while True:
        lines.clear()
        bad_lines.clear()
        row: list[str] = []
        error: csv.Error | None = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as found:
            error = found
        if len(lines) > 1 and _joins_records(lines, dialect, error):
            again += reversed(lines[1:])
            read -= len(lines) - 1
            reader = new_reader()
            yield Row(read, [], _STRAY_QUOTE, lines[0])
        elif error is not None:
            where = f"; the record begins in line {read - len(lines) + 1}" if len(lines) > 1 else ""
            yield Row(read, [], f"{error}{where}", lines[0] if lines else "")
        elif row:
            yield Row(read, row, bad_lines[-1] if bad_lines else None)


def _joins_records(lines: Sequence[str], dialect: Dialect, error: csv.Error | None) -> bool:
    """Whether these lines, read as one record, are records of their own.

    A line looks like a record if it has as many fields, and no space after a delimiter, as prose
    would have. If the csv module found no error, all lines must, and enough to rule out chance.
    """
    width = len(dialect.columns)
    alike = sum(_looks_like_a_record(line, dialect.delimiter, width) for line in lines)
    if error is None:
        return alike == len(lines) and (len(lines) - 1) * (width - 1) >= _MOST_BY_CHANCE
    return 2 * alike >= len(lines) and (width > 1 or "end of data" in str(error))


def _looks_like_a_record(line: str, delimiter: str, width: int) -> bool:
    fields = line.rstrip("\r\n").split(delimiter)
    return (
        len(fields) >= width
        and not any(map(str.strip, fields[width:]))
        and not any(field.startswith(" ") for field in fields[1:])
    )


def _escaped_rows(file: IO[bytes], dialect: Dialect) -> Iterator[Row]:
    """Records as databases write them: a backslash before what is no delimiter or line end."""
    pending = ""
    for number, content, fault, _ in islice(bounded_lines(file), dialect.first_line - 1, None):
        text = content.decode("utf-8", errors="surrogateescape")
        body = text.rstrip("\r\n")
        if fault is None and _ends_escaped(body) and len(pending) < MAX_LINE_BYTES:
            pending += text
            continue
        line, pending = pending + body, ""
        if fault is not None or line:
            yield Row(number, [_unescaped(field) for field in _split(line)], fault)
    if pending:
        yield Row(number, [], "the file ends in the midst of a record")


def _ends_escaped(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _split(line: str) -> list[str]:
    fields: list[str] = []
    for part in line.split("\t"):
        if fields and _ends_escaped(fields[-1]):
            fields[-1] += "\t" + part
        else:
            fields.append(part)
    return fields


def _unescaped(field: str) -> str:
    if field == "\\N":
        return ""
    if "\\" not in field:
        return field
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), field, flags=re.DOTALL)
