"""The context: what is expensive to set up before the first inference, and its identity."""

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from services.contracts.bounds import MAX_ENGINE_ARGUMENTS, Name
from services.contracts.values import Value, content_id

DType = Literal["auto", "bfloat16", "float16", "float32"]


class ContextSpec(Value):
    """A model and how an engine loads it. Equal specs are one context, on any device.

    `revision` pins the weights: a hub commit, or the fingerprint of a local directory, so that a
    model that is changed in place becomes another context. `engine_arguments` are command-line
    arguments of the engine that change its results. Arguments that only tune it for a device are
    chosen by the worker and are not part of the identity.
    """

    model: Name
    revision: Name | None = None
    dtype: DType = "bfloat16"
    max_model_tokens: Annotated[int, Field(ge=16, le=10_000_000)] = 1024
    engine_arguments: Annotated[tuple[Name, ...], Field(max_length=MAX_ENGINE_ARGUMENTS)] = ()
    # Excluded if None, so that ids and messages without an adapter do not change.
    adapter: Annotated[Name | None, Field(exclude_if=lambda adapter: adapter is None)] = None
    """A LoRA adapter of the model: a directory, or a name on the hub."""
    adapter_revision: Annotated[Name | None, Field(exclude_if=lambda pin: pin is None)] = None
    """Pins the adapter's weights, as `revision` does the model's."""

    @cached_property
    def base(self) -> "ContextSpec":
        """The same without an adapter. One engine serves all adapters of the same base."""
        if self.adapter is None:
            return self
        return self.model_copy(update={"adapter": None, "adapter_revision": None})

    @cached_property
    def context_id(self) -> str:
        return content_id("ctx", self.model_dump(mode="json"))
