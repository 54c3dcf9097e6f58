"""The base of all contract models: frozen, without unknown fields, with an identity by content."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value that refuses unknown fields, except where `wire.decode` ignores them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A changed copy that is validated and computes its own identity: pydantic's `model_copy`
        would keep the cached one.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **(update or {})})


def content_id(prefix: str, value: object, *, hex_digits: int = 16) -> str:
    """An identity that depends on content only: `prefix-` and 4 x `hex_digits` bits of BLAKE2b.

    `value` is any JSON value; keys are sorted, so the order of fields does not matter.
    """
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(canonical.encode(), digest_size=hex_digits // 2).hexdigest()
    return f"{prefix}-{digest}"
