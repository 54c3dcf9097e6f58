"""The file of a sweep: claims, prompts and models. docs/experiments.md explains every key."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError

from services.contracts import ContextSpec
from services.contracts.bounds import Name
from services.contracts.contexts import DType
from services.contracts.errors import InputError, UsageError
from services.contracts.prompts import WrittenLabel
from services.contracts.values import Value
from services.contracts.wire import first_fault
from services.producer.yaml_file import read_mapping

_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
# The keys that are not named as their flags.
_KEYS = {"column": "columns", "engine_argument": "engine_arguments"}


class _NamesKey(InputError):
    """It names the sweep file and the key."""


def _shorthand(key: str) -> BeforeValidator:
    """A text stands for a mapping with only this key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class ClaimsEntry(Value):
    """A file of claims, and how it is read. The keys are the flags of `keepwarm run`."""

    file: Path
    format: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    label_map: dict[WrittenLabel, WrittenLabel] = Field(default_factory=dict)
    each_evidence: Annotated[bool, Field(strict=True)] = False
    corpus: Path | None = None
    encoding: str | None = None
    split: str | None = None
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None


class ModelEntry(Value):
    """A model, and how an engine loads it. The keys are the flags of `keepwarm run`."""

    name: Name | None = None
    """In tables; by default the end of the model's name, and that of its adapter."""
    model: Name | None = None
    """By default that of `keepwarm run`."""
    revision: Name | None = None
    dtype: DType = "bfloat16"
    max_model_tokens: Annotated[int, Field(strict=True)] = 1024
    engine_arguments: tuple[Name, ...] = ()
    adapter: Name | None = None
    adapter_revision: Name | None = None

    def name_of(self, context: ContextSpec) -> str:
        """The name in tables. `context`: the entry's, pinned."""
        ends = [Path(part).name for part in (context.model, context.adapter) if part is not None]
        return self.name or "+".join(ends)


class SweepFile(Value):
    """Cells are all prompts with all models. Paths in the file are relative to it.

    With `select`, that fraction of the claims decides the order of the cells, and their results are
    those on the other claims. `select_seed` is the seed of the random choice.
    """

    claims: Annotated[ClaimsEntry, _shorthand("file")]
    prompts: Annotated[tuple[Path, ...], Field(min_length=1)]
    models: Annotated[
        tuple[Annotated[ModelEntry, _shorthand("model")], ...], Field(min_length=1)
    ] = (ModelEntry(),)
    select: Annotated[float, Field(gt=0, lt=1)] | None = None
    select_seed: Annotated[int, Field(strict=True)] = 0
    out: Path | None = None
    """The directory of the results; results/NAME of the working directory by default."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The sweep in the file, with paths as seen from the working directory.

        Raises InputError that names the file, the key and the next step.
        """
        content = read_mapping(path, "sweep file", "samples/sweep.yaml")
        try:
            sweep = cls.model_validate(content)
        except ValidationError as error:
            raise InputError(
                f"the sweep file {path}: {first_fault(error)}; see samples/sweep.yaml and "
                "docs/experiments.md"
            ) from error
        base = path.parent
        claims, out = sweep.claims, sweep.out
        paths = {
            "file": _path(base, claims.file),
            "corpus": claims.corpus and _path(base, claims.corpus),
        }
        return sweep.model_copy(
            update={
                "claims": claims.model_copy(update=paths),
                "prompts": tuple(_path(base, prompt) for prompt in sweep.prompts),
                "models": tuple(_located(base, entry) for entry in sweep.models),
                "out": out and _path(base, out),
            }
        )


def _path(base: Path, path: Path) -> Path:
    try:
        return base / path.expanduser()
    except RuntimeError:  # no such user: it will not be found
        return base / path


def _located(base: Path, entry: ModelEntry) -> ModelEntry:
    """The entry with absolute paths of directories; names on the hub stay."""

    def located(name: str | None) -> str | None:
        if name is None:
            return None
        directory = _path(base, Path(name))
        if name.startswith((".", "/", "~")) or directory.is_dir():
            return str(directory.resolve())
        return name

    return entry.model_copy(
        update={"model": located(entry.model), "adapter": located(entry.adapter)}
    )


@contextmanager
def keys_for_flags(path: Path, key: str) -> Iterator[None]:
    """What is wrong with a flag's value is wrong with a value under `key` of the sweep file.

    Raises InputError that names the file and the key, instead of UsageError and InputError that
    name flags.
    """

    def named(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return _KEYS.get(name, name)

    try:
        yield
    except _NamesKey:
        raise
    except (InputError, UsageError) as error:
        raise _NamesKey(f"the sweep file {path}: {key}: {_FLAG.sub(named, str(error))}") from error


def require_names(path: Path, key: str, names: list[str], values: list[Any]) -> None:
    """Raises InputError when two prompts, or two models, are the same or have the same name."""
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        if value in values[:number]:
            raise _NamesKey(
                f"the sweep file {path}: {key}: number {number + 1}, {name!r}, is the same as "
                f"number {values.index(value) + 1}; leave one out"
            )
        if name in names[:number]:
            raise _NamesKey(
                f"the sweep file {path}: {key}: number {names.index(name) + 1} and number "
                f"{number + 1} have the name {name!r}; give one of them another `name`"
            )
