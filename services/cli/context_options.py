"""The flags for a context, and the context that they define."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from services.cli.printable import printable
from services.contracts import ContextSpec, Settings
from services.contracts.contexts import DType
from services.contracts.errors import ModelError, UsageError
from services.contracts.wire import first_fault
from services.models.files import pin_model

_FIRST_LINE_SECONDS, _LINE_SECONDS = 2.0, 10.0

DEMO_MODEL = Path(".models/SmolLM2-135M-Instruct")
DEMO_MODEL_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model's directory, or its name on the hub. Default: the demo model. "
        "[dim]\\[env: KEEPWARM_MODEL][/dim]",
        show_default=False,
    ),
]
WorkersModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model's directory, or its name on the hub. Default: chosen by demand. "
        "[dim]\\[env: KEEPWARM_MODEL][/dim]",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="The model's revision. Default: the current one.", show_default=False),
]
DTypeOption = Annotated[DType, typer.Option(help="The data type of the model's weights.")]
MaxTokensOption = Annotated[
    int,
    typer.Option(
        "--max-model-tokens",
        min=16,
        help="Most tokens of a prompt and its answer; longer claims become dead claims.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="A LoRA adapter for the model: its directory, or its name on the hub.",
        show_default=False,
    ),
]
AdapterRevisionOption = Annotated[
    str | None,
    typer.Option(
        "--adapter-revision",
        help="The adapter's revision. Default: the current one.",
        show_default=False,
    ),
]
EngineArgumentOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-argument",
        help="An engine argument that is part of the context, like --quantization=fp8. Repeatable.",
        show_default=False,
    ),
]


class _ReadingWeights:
    """Reports progress on standard error when reading takes long."""

    def __init__(self) -> None:
        self._next_line = time.monotonic() + _FIRST_LINE_SECONDS

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            print(
                printable(
                    f"Reading the weights to identify them: {done / 1e9:.1f} of "
                    f"{total / 1e9:.1f} GB (once for each file)"
                ),
                file=sys.stderr,
            )


def context_from_flags(
    settings: Settings,
    model: str | None,
    revision: str | None,
    dtype: DType,
    max_model_tokens: int,
    engine_arguments: list[str] | None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> ContextSpec:
    """The context that the flags define, pinned to the current weights.

    Raises ModelError when there is no such model, UsageError when a flag is out of bounds.
    """
    if adapter_revision is not None and adapter is None:
        raise UsageError("--adapter-revision needs an adapter; name it with --adapter")
    demo = str(DEMO_MODEL) if DEMO_MODEL.is_dir() else DEMO_MODEL_ON_HUB
    try:
        spec = ContextSpec(
            model=model or settings.model or demo,
            revision=revision,
            dtype=dtype,
            max_model_tokens=max_model_tokens,
            engine_arguments=tuple(engine_arguments or ()),
            adapter=adapter,
            adapter_revision=adapter_revision,
        )
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0]).replace("_", "-")
        flag = "engine-argument" if field == "engine-arguments" else field
        what = first_fault(error).partition(": ")[2]
        verb = " ".join(sys.argv[1 : 3 if sys.argv[1:2] == ["contexts"] else 2])
        raise UsageError(f"--{flag}: {what}; see `keepwarm {verb} --help`") from error
    if spec.model != DEMO_MODEL_ON_HUB or model or settings.model:
        return pin_model(spec, settings.cache_dir, _ReadingWeights())
    # Outside a clone the user did not choose this model, and it is too small for real work.
    default = (
        f"neither --model nor KEEPWARM_MODEL is set, so this uses the demo model "
        f"{DEMO_MODEL_ON_HUB}"
    )
    try:
        pinned = pin_model(spec, settings.cache_dir, _ReadingWeights())
    except ModelError as error:
        raise ModelError(f"{default}: {error}") from error
    print(printable(f"Note: {default}; name a larger one for real work."), file=sys.stderr)
    return pinned
