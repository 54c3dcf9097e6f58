"""Encode and decode messages: JSON with a schema version and a size limit.

docs/decisions/0031-message-versions.md describes when the version changes.
"""

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import from_json

from services.contracts.bounds import MAX_MESSAGE_BYTES
from services.contracts.errors import MessageInvalid, MessageTooNew
from services.contracts.values import Value

PROOFS_VERSION = 2
"""The version of messages about claims that have proofs."""
REASONING_VERSION = 3
"""The version of messages about claims whose prompt reasons first."""
VERSION = REASONING_VERSION
"""The newest version of messages that this Keepwarm reads."""

_SHOWN_CHARS = 120
# Identities are computed from these fields: a reader that ignored a part would get another id.
_IDENTIFIED = {"run", "context"}

CONTENT_TYPE = "application/json"


class Message(Value):
    """A value that is sent through the broker.

    `schema_version` is the lowest version with which a reader handles this message correctly.
    """

    schema_version: Annotated[int, Field(ge=1, le=VERSION)] = 1

    wire_type: ClassVar[str]
    """The AMQP `type` property: the class's name by default. A renamed class keeps its old name
    here.
    """
    transient: ClassVar[bool] = False
    """Whether it is only for current listeners: no queue keeps it for later ones."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "wire_type" not in cls.__dict__:
            cls.wire_type = cls.__name__


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The message as UTF-8 JSON.

    Raises MessageInvalid when it is larger than `MAX_MESSAGE_BYTES`.
    """
    body = message.__pydantic_serializer__.to_json(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(
            f"a {message.wire_type} of {len(body):,} bytes is over the limit of "
            f"{MAX_MESSAGE_BYTES:,}; use a smaller --batch-size"
        )
    return body


def decode(kind: type[M], body: bytes) -> M:
    """The message in `body`. Unknown fields are ignored, except in fields that make an identity.

    Raises MessageInvalid with the first fault, MessageTooNew when the message needs a newer reader.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(f"{len(body):,} bytes are over the limit of {MAX_MESSAGE_BYTES:,}")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        _raise_if_newer(kind, body)
        if not _has_only_unknown_fields(error):
            raise MessageInvalid(f"not a {kind.wire_type}: {first_fault(error)}") from error
    try:
        return kind.model_validate_json(body, extra="ignore")
    except ValidationError as error:
        raise MessageInvalid(f"not a {kind.wire_type}: {first_fault(error)}") from error


def _raise_if_newer(kind: type[Message], body: bytes) -> None:
    try:
        found = from_json(body)
    except ValueError:
        return
    version = found.get("schema_version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > VERSION:
        left = "is ignored" if kind.transient else "stays in its queue"
        raise MessageTooNew(
            f"a {kind.wire_type} of version {version} came, and this Keepwarm reads up to "
            f"{VERSION}; it {left}. Install the sender's version of Keepwarm (docs/operations.md, "
            "Upgrade)"
        )


def _has_only_unknown_fields(error: ValidationError) -> bool:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return all(
        fault["type"] == "extra_forbidden" and _IDENTIFIED.isdisjoint(fault["loc"][:-1])
        for fault in faults
    )


def first_fault(error: ValidationError) -> str:
    """One line for the first fault of a model: field and problem, never the value."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])[:_SHOWN_CHARS]
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])
