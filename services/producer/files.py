"""The files that a path names, and their content: decompressed, as UTF-8, and readable twice."""

import bz2
import codecs
import io
import lzma
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from services.contracts.bounds import MAX_LINE_BYTES
from services.contracts.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STANDARD_INPUT = "-"

_CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16
"""Bytes that are read to recognise a file's type."""

_ENCODING_SAMPLE_BYTES = 256
_START_BYTES = 4096
TABLE_MARKS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""The first bytes of a Parquet file, an Arrow file, and an Arrow stream."""
_OFFICE_MARKS = (b"[Content_Types].xml", b"_rels/.rels", b"vnd.oasis.opendocument")

# Cells of a file with CR alone may contain LF.
_QUOTED = re.compile(rb'"[^"]*(?:"|\Z)')

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_TABLE_SUFFIXES = (".parquet", ".arrow")
# Not .json, which metadata have as well.
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
# Where `datasets` and the hub put the files of splits; they use no deeper directories.
_SPLIT_PATTERNS = ("*", "*/*", "*/*/*")
# `train-00000-of-00002.parquet` and `data-00000-of-00001.arrow` are parts of one table.
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
# So are `claims-000000000000.parquet` and its followers, which BigQuery writes.
_NUMBERED = re.compile(r"(?:(.*)-(?=\d{12}$))?(\d+)")
# So are all files of a directory that are called so by the hub, by Spark, Dask and pyarrow, or by
# DuckDB and Snowflake (`data_0.parquet`, `data_0_1_0.snappy.parquet`).
_PART = re.compile(r"part[-.](?:[rm]-)?\d+.*|data(?:_\d+)+(?:\..*)?")
_TEXT_PART = re.compile(r"part-(?:[rm]-)?\d+[^.]*(\.c\d+)?(\.(json|jsonl|csv|tsv|txt))?(\.\w+)?")


def open_file(path: str) -> tuple[IO[bytes], str]:
    """A file (`-`: standard input), seekable, and its name for messages.

    Raises InputError that names the file and the next step.
    """
    if path == STANDARD_INPUT:
        name = "standard input"
        if sys.stdin is None:
            raise InputError("standard input is closed; name a file, or pipe one in")
        return _spooled(_chunks(sys.stdin.buffer), name), name
    # A name that is not UTF-8 can be opened, but not written into a message.
    name = path.encode(errors="replace").decode()
    try:
        file: IO[bytes] = Path(path).open("rb")  # noqa: SIM115  (the caller closes it)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except PermissionError as error:
        raise InputError(f"{name} may not be read by this user; see `ls -l` and chmod") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error
    if not file.seekable():
        with file as stream:
            file = _spooled(_chunks(stream), name)
    return file, name


def dataset_files(directory: Path, split: str | None) -> list[Path]:
    """The files of one split of a dataset's directory, in order: Parquet or Arrow files, or the
    parts that Spark wrote as text.

    Raises InputError when there is none, when there are several splits and none is named, or when
    parts of the split are missing or cannot all belong to it.
    """
    if (directory / "_temporary").exists() and not (directory / "_SUCCESS").exists():
        raise InputError(
            f"{directory} is not complete: it has Spark's directory _temporary and no _SUCCESS; "
            "wait for the job that writes it, or run that again"
        )
    files = sorted(
        (
            path
            for pattern in _SPLIT_PATTERNS
            for path in directory.glob(pattern)
            if path.is_file()
            and not path.name.startswith("cache-")  # `datasets` keeps results of map() there
            and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        ),
        key=_in_order,
    )
    found = [path for path in files if path.suffix in _TABLE_SUFFIXES]
    texts = [p for p in files if _TEXT_PART.fullmatch(p.name) and p.suffix not in _TABLE_SUFFIXES]
    others = texts or [p for p in files if p.suffix in _TEXT_SUFFIXES]
    if found and others:
        raise InputError(
            f"{directory} has files of several kinds ({found[0].name}, {others[0].name}); name one "
            "of them, or keep those of one kind in it"
        )
    found = found or texts
    if not found:
        raise InputError(
            f"{directory} is a directory without Parquet or Arrow files; name a file of claims in "
            "it, or a directory that `datasets` or Spark saved"
        )
    for folder in found[0].relative_to(directory).parent.parts:
        if "=" in folder:
            raise InputError(
                f"{directory} is partitioned: the values of {folder.partition('=')[0]!r} are in "
                "the names of its directories, which are not read; write it without partitionBy"
            )
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path, directory), []).append(path)
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        listed = ", ".join(sorted(splits))
        what = "has several splits" if split is None else f"has no split {split!r}"
        raise InputError(f"{directory} {what}; name one of them with --split: {listed}")
    _require_all_parts(splits[split], directory)
    return splits[split]


def _in_order(path: Path) -> list[str | int]:
    """`part.2` is before `part.10`."""
    return [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", str(path))]


def _split_of(path: Path, directory: Path) -> str:
    """`data/train-00000-of-00001.parquet` and `train/0000.parquet` -> train;
    `test/data-00000-of-00001.arrow` -> test.
    """
    shard = _SHARD.match(path.stem) or _NUMBERED.fullmatch(path.stem)
    name = shard[1] or "" if shard else "" if _PART.fullmatch(path.stem) else path.stem
    folders = path.relative_to(directory).parent.parts
    parts = [part for part in (*folders, name) if part not in ("", "data")]
    return "/".join(parts) or name or directory.name


def _require_all_parts(files: Sequence[Path], directory: Path) -> None:
    """Raises InputError where the names say that there are more parts than files, or that there
    are parts of two tables.
    """
    parts: dict[tuple[Path, str, int], set[int]] = {}
    numbered: dict[tuple[Path, str], list[str]] = {}
    for path in files:
        if shard := _SHARD.fullmatch(path.stem):
            table = (path.parent, shard[1], int(shard[3]))
            parts.setdefault(table, set()).add(int(shard[2]))
        elif part := _NUMBERED.fullmatch(path.stem):
            numbered.setdefault((path.parent, part[1] or ""), []).append(part[2])
    for table_of, numbers in numbered.items():
        if min(numbers, key=int).startswith("0"):  # others are dates, or counted from 1
            found = set(map(int, numbers))
            parts[*table_of, max(found) + 1] = found
    totals: dict[tuple[Path, str], int] = {}
    for (folder, name, total), found in parts.items():
        other = totals.setdefault((folder, name), total)
        if other != total:
            raise InputError(
                f"{directory} has parts of two tables, {name}-*-of-{other:05d} and "
                f"{name}-*-of-{total:05d}; remove those of the older one"
            )
        if missing := total - len(found):
            first = next(number for number in range(total) if number not in found)
            what = f"{folder.name}/{name}".rstrip("/")
            raise InputError(
                f"{directory}: of the {total:,} parts of {what} {missing:,} are missing, the "
                f"first is number {first:05d}; download the directory again"
            )


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """The content of a compressed file, which is recognised by its first bytes; any other file
    unchanged.

    Raises InputError for an archive of several files. Reading damaged data raises InputError.
    """
    inside = _decompressed(file, name)
    start = inside.read(_START_BYTES)
    inside.seek(0)
    if inside is not file and start.startswith(TABLE_MARKS):  # read from its end
        return _spooled(_chunks(inside), name)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        if any(mark in start for mark in _OFFICE_MARKS):
            raise InputError(f"{name} is an office document; save it as CSV (UTF-8) and name that")
        raise InputError(f"{name} is a ZIP archive; unpack it (`unzip`) and name the file in it")
    if start[257:262] == b"ustar":
        raise InputError(f"{name} is a tar archive; unpack it (`tar -xf`) and name the file in it")
    return inside


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    start = file.read(8)
    file.seek(0)
    for magic, kind, new in _COMPRESSIONS:
        if start.startswith(magic):
            return io.BufferedReader(_Decompressed(file, name, kind, new), _CHUNK_BYTES)
    return file


def as_utf8(file: IO[bytes], name: str, encoding: str | None = None) -> IO[bytes]:
    """Text in `encoding`, in UTF-16 or UTF-32, or with CR alone as line ends, rewritten as UTF-8
    with LF.

    Any other file is returned as it is. Raises InputError when the text breaks its encoding.
    """
    sample = file.read(SAMPLE_BYTES)
    file.seek(0)
    encoding = encoding or encoding_of(sample)
    if encoding is not None:
        converted = _spooled(_decoded(file, encoding, name), name)
        file.close()
        return as_utf8(converted, name)
    if b"\r" in sample and b"\n" not in _QUOTED.sub(b"", sample):
        converted = _spooled((chunk.replace(b"\r", b"\n") for chunk in _chunks(file)), name)
        file.close()
        return converted
    return file


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


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, of all its streams; it can be read again from its start.

    Raises InputError for damaged data, and where other bytes than NULs follow a stream.
    """

    def __init__(self, file: IO[bytes], name: str, kind: str, new: Callable[[], Any]) -> None:
        self._file = file
        self._name = name
        self._kind = kind
        self._new = new
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if offset or whence != io.SEEK_SET:
            raise io.UnsupportedOperation("seek")
        self._decompressor = self._new()
        self._position = self._file.seek(0)
        return 0

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = b""
        while not data:
            follows = self._decompressor.eof
            block = self._following() if follows else b""
            if follows:
                if not block:
                    break
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                block = self._file.read(_CHUNK_BYTES)
                if not block:
                    raise InputError(
                        f"{self._name}: its {self._kind} data end too early; fetch or write it "
                        "again"
                    )
            try:
                data = self._decompressor.decompress(block, len(buffer))
            except _DAMAGES as error:
                what = f"are damaged ({error})"
                if follows:
                    begin = self._file.tell() - len(block)
                    count = self._file.seek(0, io.SEEK_END) - begin
                    what = (
                        f"end at byte {begin:,} and are followed by {count:,} bytes that are no "
                        f"intact {self._kind} data"
                    )
                raise InputError(
                    f"{self._name}: its {self._kind} data {what}; fetch or write it again"
                ) from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _following(self) -> bytes:
        """Bytes after the end of a stream and the NULs that pad it; none at the end of the file."""
        block: bytes = self._decompressor.unused_data.lstrip(b"\0")
        while not block and (chunk := self._file.read(_CHUNK_BYTES)):
            block = chunk.lstrip(b"\0")
        return block

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Gunzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    eof = property(lambda self: self._zlib.eof)
    unused_data = property(lambda self: self._zlib.unused_data)
    needs_input = property(lambda self: not self._zlib.unconsumed_tail)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, most)


_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", "gzip", _Gunzip),
    (b"BZh", "bzip2", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\0", "xz", lzma.LZMADecompressor),
    (b"\x28\xb5\x2f\xfd", "zstd", zstd.ZstdDecompressor),
)
_DAMAGES = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


def encoding_of(sample: bytes) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark or by the positions of NULs; None otherwise."""
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            return encoding
    start = sample[:_ENCODING_SAMPLE_BYTES]
    nuls = (start[::2].count(0), start[1::2].count(0))
    if max(nuls) * 4 > len(start) and min(nuls) == 0:  # Latin letters without a mark
        return "utf-16-be" if nuls[0] else "utf-16-le"
    return None


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _decoded(file: IO[bytes], encoding: str, name: str) -> Iterator[bytes]:
    """The text as UTF-8, without a byte order mark."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in _chunks(file):
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise InputError(
            f"{name} is not {encoding.upper()} throughout ({error}); save it as UTF-8, or name its "
            "encoding with --encoding"
        ) from error


def _spooled(chunks: Iterable[bytes], name: str) -> IO[bytes]:
    """A copy of a stream in a temporary file without a name, which cannot be left behind."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    try:
        for chunk in chunks:
            spool.write(chunk)
        spool.seek(0)
    except OSError as error:
        spool.close()
        raise InputError(
            f"{name} cannot be copied to {tempfile.gettempdir()}: {error.strerror}; free "
            "some space, or set TMPDIR to a directory with more"
        ) from error
    except BaseException:
        spool.close()
        raise
    return spool
