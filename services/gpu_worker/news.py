"""What the collector's notices say, as a worker knows it."""

import structlog

from services.contracts import ContextDemand, Notice, decode
from services.contracts.errors import MessageInvalid, MessageTooNew

log = structlog.get_logger(__name__)


class News:
    """The latest notice. Heard on a link's thread, read on any."""

    def __init__(self) -> None:
        self._notice = Notice()
        self.number = 0
        """Of the notices that came, so that one can tell whether there was another."""

    @property
    def cancelled(self) -> tuple[str, ...]:
        """Submissions whose claims nobody wants any more."""
        return self._notice.cancelled

    @property
    def contexts(self) -> tuple[ContextDemand, ...]:
        """The directory: contexts with claims waiting, and who is there."""
        return self._notice.contexts

    def hear(self, body: bytes) -> None:
        """A notice came; it replaces what was said before. What is none is left alone."""
        try:
            self._notice = decode(Notice, body)
            self.number += 1
        except (MessageInvalid, MessageTooNew) as error:
            log.warning("notice.refused", reason=str(error))
