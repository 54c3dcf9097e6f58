"""Size limits of every text, list and message that enters or leaves a service."""

from typing import Annotated

from pydantic import Field, StringConstraints

MAX_CLAIM_CHARS = 8_192
MAX_EVIDENCE_CHARS = 65_536
MAX_ID_CHARS = 256
MAX_NAME_CHARS = 512
MAX_PROMPT_CHARS = 65_536
MAX_RAW_TEXT_CHARS = 1_024
MAX_DETAIL_CHARS = 16_384
MAX_LABELS = 32
MAX_COUNTED = 101
"""Kinds that are counted separately: the hundred most frequent, and all others as one."""
MAX_LEFT_OUT = 1_000
"""Rejected and repeated records whose ids are reported."""
MAX_EXAMPLES = 64
MAX_FIELD_USES = 4
"""How often a template may use the claim, and how often the evidence: each use makes every prompt
longer, and costs the worker memory."""
MAX_CONSTANT_CHARS = 4 * 1024 * 1024
"""Instructions and examples together, with each example in the template."""
MAX_ENGINE_ARGUMENTS = 128

MAX_BATCH_CLAIMS = 1_024
# RabbitMQ 4 refuses messages over 16 MiB. The producer closes a batch at half of our own limit, so
# that its verdicts, which contain the claims again, stay below the limit, too.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
MAX_BATCH_BYTES = MAX_MESSAGE_BYTES // 2
MAX_LINE_BYTES = 1024 * 1024

# The ranges of a store's columns.
Int31 = Annotated[int, Field(ge=0, le=2**31 - 1)]
Int63 = Annotated[int, Field(ge=0, le=2**63 - 1)]

# PostgreSQL cannot store NUL in text, so no text may contain it.
_NO_NUL = r"^[^\x00]*$"
_NO_NUL_NOT_BLANK = r"^[^\x00]*[^\x00\s][^\x00]*$"

Identity = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS, pattern=_NO_NUL_NOT_BLANK)
]
# Made by Keepwarm, not by a user: safe in names of files and queues, and on a screen.
OwnId = Annotated[
    str,
    StringConstraints(
        min_length=1, max_length=MAX_ID_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    ),
]
# A part of an AMQP message id, which may have 255 bytes.
BatchId = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[!-~]+$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS, pattern=_NO_NUL)]
ClaimText = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_CLAIM_CHARS, pattern=_NO_NUL_NOT_BLANK)
]
EvidenceText = Annotated[str, StringConstraints(max_length=MAX_EVIDENCE_CHARS, pattern=_NO_NUL)]
PromptText = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS, pattern=_NO_NUL)]
RawText = Annotated[str, StringConstraints(max_length=MAX_RAW_TEXT_CHARS, pattern=_NO_NUL)]
Detail = Annotated[str, StringConstraints(max_length=MAX_DETAIL_CHARS, pattern=_NO_NUL)]
