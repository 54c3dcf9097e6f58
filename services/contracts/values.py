"""What all contract models share: frozen, closed to unknown fields, with an identity by content."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value without unknown fields; `wire.decode` says where a message may have some."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A changed copy, checked like any other value, and with an identity of its own: pydantic
        would copy what was cached for the old one.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **(update or {})})


def content_id(prefix: str, value: object, *, hex_digits: int = 16) -> str:
    """An identity that depends on content alone: `prefix-` and 4 x `hex_digits` bits of BLAKE2b.

    `value` is anything that JSON can hold; keys are sorted, so that field order does not matter.
    """
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(canonical.encode(), digest_size=hex_digits // 2).hexdigest()
    return f"{prefix}-{digest}"
