"""Lines from a socket, with a deadline and a bound."""

import socket

from services.contracts.clock import awake
from services.contracts.errors import KeeperError

_MOST_LINE_BYTES = 1024 * 1024


class Lines:
    """The lines that come on a connection. What has come of one that is late is kept."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""

    def next(self, timeout_seconds: float) -> bytes | None:
        """The next one, without its end; None when the other side is gone.

        Raises TimeoutError, and KeeperError for a line that is too long.
        """
        deadline = awake() + timeout_seconds
        while b"\n" not in self._unread:
            self._connection.settimeout(max(0.0, deadline - awake()))
            try:
                piece = self._connection.recv(65536)
            except (BlockingIOError, TimeoutError) as error:
                if awake() < deadline:  # we were stopped meanwhile, and so was the other side
                    continue
                raise TimeoutError from error
            except ConnectionError:
                return None
            if not piece:
                return None
            self._unread += piece
            if len(self._unread) > _MOST_LINE_BYTES:
                raise KeeperError(f"a line of more than {_MOST_LINE_BYTES:,} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        return line
