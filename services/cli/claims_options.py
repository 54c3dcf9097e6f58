"""The flags for the file of claims, and for the prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, cast, get_args

import typer

from services.cli.screen import Screen, say
from services.contracts import PromptSpec
from services.contracts.errors import UsageError
from services.producer import Container, Selection, read_prompt
from services.producer.dataset_formats import FORMATS, PLAIN

CONTAINERS = get_args(Container)
FORMAT_NAMES = tuple(known.name for known in (*FORMATS, PLAIN))

PromptOption = Annotated[
    Path | None,
    typer.Option(
        "--prompt",
        help="A prompt file like samples/prompt.yaml. Default: FEVER's three labels.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Verify only the first N lines.", show_default=False),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        help="With --limit: a random sample with this seed instead of the first lines.",
        show_default=False,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Claims per message. [dim]\\[env: KEEPWARM_BATCH_SIZE; default: 64][/dim]",
        show_default=False,
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="The column or key of a field: claim=text, evidence=…, label=…, id=…. Repeatable.",
        show_default=False,
    ),
]


FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="JSONL, JSON, CSV, TSV or Parquet, compressed or not; a directory saved by Hugging "
        "Face's `datasets`; - for standard input.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"The file's type ({', '.join(CONTAINERS)}) or data set "
        f"({', '.join(FORMAT_NAMES)}); see docs/formats.md. Default: recognised.",
        show_default=False,
    ),
]
LabelMapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label-map",
        help='The meaning of a label in the file: "DISPUTED=NOT ENOUGH INFO". Repeatable. '
        "Other labels that the prompt does not have are left out of the scores.",
        show_default=False,
    ),
]
EachEvidenceOption = Annotated[
    bool,
    typer.Option(
        "--each-evidence", help="One claim for each piece of evidence, with that piece's label."
    ),
]
CorpusOption = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        "--wiki",
        help="The source of evidence that is given as pages and sentence numbers: the directory of "
        "FEVER's Wikipedia dump, or SciFact's corpus.jsonl.",
        show_default=False,
    ),
]
EncodingOption = Annotated[
    str | None,
    typer.Option(
        help="The text's encoding, like windows-1252. UTF-8, UTF-16 and UTF-32 are recognised.",
        show_default=False,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(help="The split in a directory of Parquet or Arrow files.", show_default=False),
]


@dataclass(frozen=True)
class ClaimsOptions:
    """The flags for a file of claims."""

    container: Container | None
    encoding: str | None
    split: str | None
    selection: Selection

    @classmethod
    def from_flags(
        cls,
        prompt: PromptSpec,
        *,
        format: str | None,
        column: list[str] | None,
        label_map: list[str] | None,
        each_evidence: bool,
        corpus: Path | None,
        encoding: str | None,
        split: str | None,
        limit: int | None,
        seed: int | None,
        only: frozenset[str] | None = None,
    ) -> Self:
        """Raises UsageError that names the flag."""
        if format is not None and format not in (*CONTAINERS, *FORMAT_NAMES):
            raise UsageError(
                f"--format {format}: there is no such format; name one of "
                f"{', '.join((*CONTAINERS, *FORMAT_NAMES))}"
            )
        check_seed(limit, seed)
        if encoding is not None and not _is_text_encoding(encoding):
            raise UsageError(
                f"--encoding {encoding}: no such text encoding; use a name that Python has, like "
                "windows-1252"
            )
        is_container = format in CONTAINERS
        return cls(
            container=cast(Container, format) if is_container else None,
            encoding=encoding,
            split=split,
            selection=Selection(
                format=None if is_container else format,
                columns=columns_from_flags(column),
                label_map=label_map_from_flags(label_map, prompt),
                each_evidence=each_evidence,
                corpus=corpus,
                limit=limit,
                seed=seed,
                only=only,
            ),
        )


def _is_text_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):
        return False
    return True


def label_map_from_flags(pairs: list[str] | None, prompt: PromptSpec) -> dict[str, str]:
    """Raises UsageError when a pair is not `label=label`, or names no label of the prompt."""
    labels: dict[str, str] = {}
    for pair in pairs or ():
        label, equals, name = (part.strip() for part in pair.rpartition("="))
        if not (label and equals and name):
            raise UsageError(f'--label-map {pair}: write it like "DISPUTED=NOT ENOUGH INFO"')
        if prompt.label_of(name) is None:
            raise UsageError(
                f"--label-map {pair}: the prompt {prompt.name!r} has no label {name!r}; it has "
                f"{', '.join(prompt.label_names)}"
            )
        if labels.get(label, name) != name:
            raise UsageError(
                f"--label-map {pair}: {label!r} is mapped to {labels[label]!r} as well; "
                "leave one out"
            )
        labels[label] = name
    return labels


def prompt_from_flag(path: Path | None) -> PromptSpec:
    """The prompt. Corrections to its file are shown on standard error."""
    if path is None:
        return PromptSpec()
    console = Screen(stderr=True)
    return read_prompt(path, lambda note: say(console, f"Note: {note}"))


def columns_from_flags(columns: list[str] | None) -> dict[str, str]:
    """Raises UsageError when an entry is not `field=column`."""
    pairs = [column.partition("=") for column in columns or ()]
    for field, equals, column in pairs:
        if not (field and equals and column):
            raise UsageError(f"--column {field}{equals}{column}: write it like claim=text")
    named = {field: column for field, _, column in pairs}
    if len(named) < len(pairs):
        fields = [field for field, _, _ in pairs]
        twice = next(field for field in fields if fields.count(field) > 1)
        raise UsageError(f"--column {twice}=… is given more than once; name one column for it")
    return named


def check_seed(limit: int | None, seed: int | None) -> None:
    if seed is not None and limit is None:
        raise UsageError("--seed takes a random sample and needs its size; set --limit as well")
