"""Lines over a unix socket, for messages in JSON.

Imports the standard library alone: a fork server runs it in an engine's interpreter.
"""

import socket
import time
from collections.abc import Callable

MAX_LINE_BYTES = 1024 * 1024


class LineTooLong(ValueError):
    """The other side sent more than a line may have."""


class LineReader:
    """Reads lines from a connection. A part of a line is kept until the rest of it arrives."""

    def __init__(
        self, connection: socket.socket, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._unread = b""

    def next(self, timeout_seconds: float) -> bytes | None:
        """The next line, without its newline; None when the other side has closed the connection.

        Raises TimeoutError, and LineTooLong.
        """
        deadline = self._clock() + timeout_seconds
        while b"\n" not in self._unread:
            self._connection.settimeout(max(0.0, deadline - self._clock()))
            try:
                piece = self._connection.recv(65536)
            except (BlockingIOError, TimeoutError) as error:
                # With a clock that stops while both sides are suspended (SIGSTOP) there is more.
                if self._clock() < deadline:
                    continue
                raise TimeoutError from error
            except ConnectionError:
                return None
            if not piece:
                return None
            self._unread += piece
            if len(self._unread) > MAX_LINE_BYTES:
                raise LineTooLong(f"a line of more than {MAX_LINE_BYTES:,} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        return line
