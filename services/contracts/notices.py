"""What every worker should know: soft state, sent again and again by the collector."""

from typing import Annotated

from pydantic import Field

from services.contracts.bounds import Identity
from services.contracts.wire import Message

MAX_CANCELLED = 1_000


class Notice(Message):
    """The latest word; it replaces what was said before."""

    cancelled: Annotated[tuple[Identity, ...], Field(max_length=MAX_CANCELLED)] = ()
    """Submissions whose claims nobody wants any more."""
