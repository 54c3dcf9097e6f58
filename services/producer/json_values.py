"""JSON values that are not one per line: an array over many lines, or consecutive objects."""

import codecs
import json
from collections.abc import Iterator
from typing import IO

from services.contracts.bounds import MAX_LINE_BYTES
from services.contracts.errors import InputError

_CHUNK_BYTES = 1 << 16
_WHITE_SPACE = " \t\r\n"


def json_values(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Each value of a JSON array (or of values one after the other): its line, and its text.

    Memory is bounded by the longest value, which may have `MAX_LINE_BYTES`. Raises InputError with
    the line where the JSON breaks: what follows cannot be parsed any more.
    """
    text = _Text(file)
    in_array = text.skip() == "["
    if in_array:
        text.advance(1)
    decoder = json.JSONDecoder()
    first = True
    while True:
        following = text.skip()
        if in_array and following == "]":
            text.advance(1)
            if text.skip():
                raise _broken(name, text.line, "something follows the end of the array")
            return
        if not following:
            if in_array:
                raise _broken(name, text.line, "the array is not closed")
            return
        if in_array and not first:
            if following != ",":
                raise _broken(name, text.line, f"`,` or `]` expected, not {following!r}")
            text.advance(1)
            text.skip()
        first = False
        yield text.line, _next_value(text, decoder, name)


def _next_value(text: "_Text", decoder: json.JSONDecoder, name: str) -> bytes:
    """The value at the current position, as text."""
    wanted = _CHUNK_BYTES
    while True:
        try:
            _, end = decoder.raw_decode(text.buffer, text.position)
            # A number at the end of the buffer may continue after it.
            if end < len(text.buffer) or text.ended:
                value = text.buffer[text.position : end]
                text.advance(end - text.position)
                return value.encode("utf-8", errors="surrogateescape")
            message, at = "it does not end", text.line
        except json.JSONDecodeError as error:
            message = error.msg
            at = text.line + text.buffer.count("\n", text.position, error.pos)
        except RecursionError:
            raise _broken(name, text.line, "it is nested too deeply") from None
        # Either the value is broken, or its rest is not read yet.
        left = len(text.buffer) - text.position
        if text.ended or left > MAX_LINE_BYTES:
            if left > MAX_LINE_BYTES and not text.ended:
                message = f"{message}, or the value is longer than {MAX_LINE_BYTES:,} bytes"
            raise _broken(name, at, message)
        text.read_until(left + wanted)
        wanted *= 2


def _broken(name: str, line: int, what: str) -> InputError:
    return InputError(
        f"{name}, line {line}: the JSON is broken here: {what}. Correct it, or write one JSON "
        "object a line, where a broken line harms no other"
    )


class _Text:
    """A file's text; only the unread rest is in memory. `line` counts from 1."""

    def __init__(self, file: IO[bytes]) -> None:
        file.seek(0)
        self._file = file
        # Bytes that are not UTF-8 become lone surrogates, which the claims parser rejects.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.buffer = ""
        self.position = 0
        self.line = 1
        self.ended = False

    def read_until(self, characters: int) -> None:
        """Buffer this many characters after the position, or all that are left."""
        self.buffer, self.position = self.buffer[self.position :], 0
        pieces = [self.buffer]
        have = len(self.buffer)
        while have < characters and not self.ended:
            chunk = self._file.read(_CHUNK_BYTES)
            self.ended = not chunk
            piece = self._decoder.decode(chunk, final=self.ended)
            pieces.append(piece)
            have += len(piece)
        self.buffer = "".join(pieces)

    def skip(self) -> str:
        """Skip white space. Returns the next character, "" at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                character = self.buffer[self.position]
                if character not in _WHITE_SPACE:
                    return character
                self.line += character == "\n"
                self.position += 1
            if self.ended:
                return ""
            self.read_until(1)

    def advance(self, characters: int) -> None:
        self.line += self.buffer.count("\n", self.position, self.position + characters)
        self.position += characters
