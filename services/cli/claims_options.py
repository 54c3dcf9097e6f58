"""The flags that say which claims are meant and how they are put to a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, cast, get_args

import typer

from services.cli.screen import Screen, say
from services.contracts import PromptSpec
from services.contracts.errors import UsageError
from services.producer import Container, Selection, read_prompt
from services.producer.published import FORMATS, PLAIN

CONTAINERS = get_args(Container)
FORMAT_NAMES = tuple(known.name for known in (*FORMATS, PLAIN))

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


FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="JSONL, JSON, CSV, TSV or Parquet, compressed or not; a directory that Hugging Face's "
        "`datasets` saved; - for standard input.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"How the file is read; recognised otherwise. Its kind: {', '.join(CONTAINERS)}; or "
        f"the data set: {', '.join(FORMAT_NAMES)} (docs/formats.md).",
        show_default=False,
    ),
]
LabelMapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label-map",
        help='What a label in the file means: "DISPUTED=NOT ENOUGH INFO". May be given several '
        "times. Labels that the prompt does not know are left out of the scores otherwise.",
        show_default=False,
    ),
]
EachEvidenceOption = Annotated[
    bool,
    typer.Option(
        "--each-evidence", help="A claim for each piece of evidence, with that piece's own label."
    ),
]
CorpusOption = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        "--wiki",
        help="Where evidence that is given as pages and sentence numbers is looked up: the "
        "directory of FEVER's Wikipedia dump, or SciFact's corpus.jsonl.",
        show_default=False,
    ),
]
EncodingOption = Annotated[
    str | None,
    typer.Option(
        help="The encoding of the text, like windows-1252; UTF-8, UTF-16, UTF-32 are recognised.",
        show_default=False,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(help="Which split of a directory of Parquet or Arrow files.", show_default=False),
]


@dataclass(frozen=True)
class ClaimsOptions:
    """What the flags say of a file of claims."""

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
                f"--format {format}: there is no such format; it is one of "
                f"{', '.join((*CONTAINERS, *FORMAT_NAMES))}"
            )
        check_seed(limit, seed)
        if encoding is not None and not _is_text_encoding(encoding):
            raise UsageError(f"--encoding {encoding}: there is no such encoding of text")
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
    """Raises UsageError for what is not `label=label`, or names no label of the prompt."""
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
                f"--label-map {pair}: {label!r} was mapped to {labels[label]!r} before"
            )
        labels[label] = name
    return labels


def prompt_from_flag(path: Path | None) -> PromptSpec:
    """The prompt. Standard error shows what was corrected in its file."""
    if path is None:
        return PromptSpec()
    console = Screen(stderr=True)
    return read_prompt(path, lambda note: say(console, f"Note: {note}"))


def columns_from_flags(columns: list[str] | None) -> dict[str, str]:
    """Raises UsageError for what is not `field=column`."""
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
        raise UsageError("--seed draws a sample and needs its size: give --limit as well")
