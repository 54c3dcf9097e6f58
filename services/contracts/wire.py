"""The wire form: JSON with a schema version, bounded in size, checked on both sides.

docs/decisions/0031-message-versions.md says when the version changes.
"""

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import from_json

from services.contracts.bounds import MAX_MESSAGE_BYTES
from services.contracts.errors import MessageInvalid, MessageTooNew
from services.contracts.values import Value

PROVEN = 2
"""The version of messages about claims that have proofs."""
VERSION = PROVEN
"""The newest version of messages that this Keepwarm reads."""

_SHOWN_CHARS = 120
# Fields of messages whose values make identities: who ignored a part of them would make another.
_IDENTIFIED = {"run", "context"}

CONTENT_TYPE = "application/json"


class Message(Value):
    """A value that travels through the broker as a whole.

    `schema_version` is the least version that a reader has to know to do right with this message.
    """

    schema_version: Annotated[int, Field(ge=1, le=VERSION)] = 1

    wire_type: ClassVar[str]
    """The `type` property of the messages that carry it: the class's name unless it says another,
    since a class may be renamed and what is on the wire may not.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "wire_type" not in cls.__dict__:
            cls.wire_type = cls.__name__


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The message as UTF-8 JSON.

    Raises MessageInvalid when it is over `MAX_MESSAGE_BYTES`: nobody would take it.
    """
    body = message.__pydantic_serializer__.to_json(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(
            f"a {message.wire_type} of {len(body):,} bytes is over the bound of "
            f"{MAX_MESSAGE_BYTES:,}; use a smaller --batch-size"
        )
    return body


def decode(kind: type[M], body: bytes) -> M:
    """The `kind` of message that `body` holds. Unknown fields are ignored, except in what makes an
    identity.

    Raises MessageInvalid, naming the first fault; MessageTooNew when the message says that one has
    to know more than this Keepwarm does.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(f"{len(body):,} bytes are over the bound of {MAX_MESSAGE_BYTES:,}")
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
        raise MessageTooNew(
            f"a {kind.wire_type} of version {version} came, and this Keepwarm reads up to "
            f"{VERSION}; it stays in its queue. Install the version that its sender has "
            "(docs/operations.md, Upgrade)"
        )


def _has_only_unknown_fields(error: ValidationError) -> bool:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return all(
        fault["type"] == "extra_forbidden" and _IDENTIFIED.isdisjoint(fault["loc"][:-1])
        for fault in faults
    )


def first_fault(error: ValidationError) -> str:
    """One line for the first of a model's faults: where, and what; never the value itself."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])[:_SHOWN_CHARS]
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])
