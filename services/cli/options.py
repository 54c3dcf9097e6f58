"""The flags that several verbs share, and what they stand for."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from services.contracts import ContextSpec, PromptSpec, Settings
from services.contracts.contexts import DType
from services.contracts.errors import UsageError
from services.gpu_worker import pin_model
from services.producer import read_prompt

DEMO_MODEL = Path(".models/SmolLM2-135M-Instruct")
DEMO_MODEL_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _without_password(url: str | None) -> str | None:
    if url and "://" in url and urlsplit(url).password:
        raise typer.BadParameter(
            "a password on a command line can be read by every user of this machine; set "
            "KEEPWARM_BROKER_PASSWORD or KEEPWARM_STORE_PASSWORD, or name a file in …_PASSWORD_FILE"
        )
    return url


BrokerOption = Annotated[
    str | None,
    typer.Option(
        "--broker",
        help="The broker, amqp[s]://user@host/vhost; its password is KEEPWARM_BROKER_PASSWORD. "
        "[dim]\\[env: KEEPWARM_BROKER_URL][/dim]",
        callback=_without_password,
        show_default=False,
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="An SQLite file, or postgresql://user@host/database. "
        "[dim]\\[env: KEEPWARM_STORE_URL][/dim]",
        callback=_without_password,
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model's directory, or its name on the hub; the demo model otherwise. "
        "[dim]\\[env: KEEPWARM_MODEL][/dim]",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="The model's revision; the present one otherwise.", show_default=False),
]
DTypeOption = Annotated[DType, typer.Option(help="The type of the model's weights.")]
MaxTokensOption = Annotated[
    int,
    typer.Option(
        "--max-model-tokens",
        min=16,
        help="The longest prompt, in tokens; longer claims become dead claims.",
    ),
]
EngineArgumentOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-argument",
        help="An argument for the engine that is part of the context, like --quantization=fp8. "
        "May be given several times.",
        show_default=False,
    ),
]
PromptOption = Annotated[
    Path | None,
    typer.Option(
        "--prompt",
        help="A prompt file, as samples/prompt.yaml; FEVER's three labels otherwise.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Take only so many lines: the first ones.", show_default=False),
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="With --limit: a random sample by this seed instead.", show_default=False),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Claims a message. [dim]\\[env: KEEPWARM_BATCH_SIZE; default: 64][/dim]",
        show_default=False,
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="Which column or key is which field: claim=text, evidence=…, label=…, id=…. "
        "May be given several times.",
        show_default=False,
    ),
]


def context_from_flags(
    settings: Settings,
    model: str | None,
    revision: str | None,
    dtype: DType,
    max_model_tokens: int,
    engine_arguments: list[str] | None,
) -> ContextSpec:
    """The context that the flags mean, pinned to the weights that are there now.

    Raises ModelError when there is no such model.
    """
    demo = str(DEMO_MODEL) if DEMO_MODEL.is_dir() else DEMO_MODEL_ON_HUB
    return pin_model(
        ContextSpec(
            model=model or settings.model or demo,
            revision=revision,
            dtype=dtype,
            max_model_tokens=max_model_tokens,
            engine_arguments=tuple(engine_arguments or ()),
        )
    )


def prompt_from_flag(path: Path | None) -> PromptSpec:
    return PromptSpec() if path is None else read_prompt(path)


def columns_from_flags(columns: list[str] | None) -> dict[str, str]:
    """Raises UsageError for what is not `field=column`."""
    pairs = [column.partition("=") for column in columns or ()]
    for field, equals, column in pairs:
        if not (field and equals and column):
            raise UsageError(f"--column {field}{equals}{column}: write it like claim=text")
    return {field: column for field, _, column in pairs}


def check_seed(limit: int | None, seed: int | None) -> None:
    if seed is not None and limit is None:
        raise UsageError("--seed draws a sample and needs its size: give --limit as well")
