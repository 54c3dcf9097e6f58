"""Control updates: soft state that the collector sends to every worker at intervals."""

from typing import Annotated, ClassVar

from pydantic import Field

from services.contracts.bounds import GeneratedId, Int31, Int63
from services.contracts.contexts import ContextSpec
from services.contracts.values import Value
from services.contracts.wire import Message

CONTROL_UPDATE_SECONDS = 2.0
"""The interval between control updates, while there is any state to send."""

MAX_CANCELLED = 1_000
MAX_CONTEXTS = 256
# Every worker receives every update. With ordinary contexts it has about 60 KiB. With very long
# engine arguments it is cut at this size, far below the limit of a message.
MAX_CONTEXTS_BYTES = 1024 * 1024


class ContextDemand(Value):
    """How much work a context has, and how many workers serve it.

    `claims_ready` wait in its queue. `claims_in_flight` are unfinished and not in the queue: in a
    worker, or in a message on its way. Both are estimates, from different moments. `workers_warm`
    counts the workers whose heartbeats report that they serve it.
    """

    context: ContextSpec
    claims_ready: Int63
    claims_in_flight: Int63
    workers_warm: Int31


class ControlUpdate(Message):
    """The current state; it replaces the previous update.

    `cancelled` are submissions whose claims workers drop. `contexts` is the demand for each context
    that unfinished runs need or that workers hold warm, the highest first.
    """

    wire_type: ClassVar[str] = "Notice"
    transient: ClassVar[bool] = True

    cancelled: Annotated[tuple[GeneratedId, ...], Field(max_length=MAX_CANCELLED)] = ()
    contexts: Annotated[tuple[ContextDemand, ...], Field(max_length=MAX_CONTEXTS)] = ()
