"""The wire form: JSON with a schema version, bounded in size, checked on both sides."""

from typing import Literal, TypeVar

from pydantic import ValidationError

from services.contracts.bounds import MAX_MESSAGE_BYTES
from services.contracts.errors import MessageInvalid
from services.contracts.values import Value

_SHOWN_CHARS = 120

CONTENT_TYPE = "application/json"


class Message(Value):
    """A value that travels through the broker as a whole."""

    schema_version: Literal[1] = 1


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The message as UTF-8 JSON.

    Raises MessageInvalid when it is over `MAX_MESSAGE_BYTES`: nobody would take it.
    """
    body = message.__pydantic_serializer__.to_json(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(
            f"a {type(message).__name__} of {len(body):,} bytes is over the bound of "
            f"{MAX_MESSAGE_BYTES:,}; use a smaller --batch-size"
        )
    return body


def decode(kind: type[M], body: bytes) -> M:
    """The `kind` of message that `body` holds. Raises MessageInvalid, naming the first fault."""
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(f"{len(body):,} bytes are over the bound of {MAX_MESSAGE_BYTES:,}")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise MessageInvalid(f"not a {kind.__name__}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """One line for the first of a model's faults: where, and what; never the value itself."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])[:_SHOWN_CHARS]
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])
