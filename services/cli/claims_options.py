"""The flags that say which claims are meant and how they are put to a model."""

from pathlib import Path
from typing import Annotated

import typer

from services.contracts import PromptSpec
from services.contracts.errors import UsageError
from services.producer import read_prompt

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
