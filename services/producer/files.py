"""The bytes of a file or of standard input: decompressed, as UTF-8, and readable twice."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

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
_OFFICE_MARKS = (b"[Content_Types].xml", b"_rels/.rels", b"vnd.oasis.opendocument")

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """The content of a compressed file, which is recognised by its first bytes; any other file
    unchanged.

    Raises InputError for an archive of several files. Reading damaged data raises InputError.
    """
    inside = _decompressed(file, name)
    start = inside.read(_START_BYTES)
    inside.seek(0)
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
    for magic, kind, opened in _COMPRESSIONS:
        if start.startswith(magic):
            return io.BufferedReader(_Checked(opened(file), file, name, kind), _CHUNK_BYTES)
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
    if b"\r" in sample and b"\n" not in sample:
        converted = _spooled((chunk.replace(b"\r", b"\n") for chunk in _chunks(file)), name)
        file.close()
        return converted
    return file


class _Checked(io.RawIOBase):
    """A decompressed stream that raises InputError for damaged data."""

    def __init__(self, stream: IO[bytes], file: IO[bytes], name: str, kind: str) -> None:
        self._stream = stream
        self._file = file
        self._name = name
        self._kind = kind

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except EOFError as error:
            raise InputError(
                f"{self._name}: its {self._kind} data end too early; fetch or write it again"
            ) from error
        except _DAMAGES as error:
            raise InputError(
                f"{self._name}: its {self._kind} data are damaged ({error}); fetch or write it "
                "again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()


_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[IO[bytes]], Any]], ...] = (
    (b"\x1f\x8b", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", "bzip2", bz2.BZ2File),
    (b"\xfd7zXZ\0", "xz", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", "zstd", zstd.ZstdFile),
)
_DAMAGES = (OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


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
