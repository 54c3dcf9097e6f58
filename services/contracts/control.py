"""What every worker should know: soft state, sent again and again by the collector."""

from typing import Annotated, ClassVar

from pydantic import Field

from services.contracts.bounds import Int31, Int63, OwnId
from services.contracts.contexts import ContextSpec
from services.contracts.values import Value
from services.contracts.wire import Message

CONTROL_UPDATE_SECONDS = 2.0
"""From one notice to the next, while there is something to say."""

MAX_CANCELLED = 1_000
MAX_CONTEXTS = 256
# Every worker gets every notice. A directory of ordinary contexts has some 60 KiB; one of contexts
# with very long arguments is cut here, well under the bound of a message.
MAX_CONTEXTS_BYTES = 1024 * 1024


class ContextDemand(Value):
    """A context's line in the directory: how much is to be done there, and by how many.

    `claims_ready` wait in its queue, `claims_in_flight` are wanted and wait no more: a worker, or
    a message on its way, has them. Both are estimates, of different moments. `workers_warm` say
    that they serve it.
    """

    context: ContextSpec
    claims_ready: Int63
    claims_in_flight: Int63
    workers_warm: Int31


class ControlUpdate(Message):
    """The latest word; it replaces what was said before.

    `contexts` is the directory: the contexts that unfinished runs want, and those that workers hold
    warm; the most wanted come first.
    """

    wire_type: ClassVar[str] = "Notice"

    cancelled: Annotated[tuple[OwnId, ...], Field(max_length=MAX_CANCELLED)] = ()
    contexts: Annotated[tuple[ContextDemand, ...], Field(max_length=MAX_CONTEXTS)] = ()
