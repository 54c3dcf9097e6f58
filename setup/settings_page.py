"""Generate the tables of docs/settings.md from the settings model and the commands' flags.

    .venv/bin/python setup/settings_page.py [--check]

A comment, `<!-- settings: FIELD … -->`, names the settings of the table under it; the text
between the tables is written by people.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.cli.main import app  # noqa: E402
from services.contracts import Settings  # noqa: E402

PAGE = REPOSITORY / "docs" / "settings.md"
# The comment, and the table under it, should there be one.
_TABLE = re.compile(r"(<!-- settings: ([a-z_ ]+) -->\n)(?:\|.*\n)*")
_HEADING = "| variable | default | meaning | flag |\n|---|---|---|---|\n"


def render(page: str) -> str:
    """The page with its tables as they should be. Raises SystemExit where a setting is in none of
    them, or in two.
    """
    named = [field for table in _TABLE.finditer(page) for field in table[2].split()]
    if sorted(named) != sorted(Settings.model_fields):
        missing = ", ".join(sorted(set(Settings.model_fields) - set(named))) or "none"
        raise SystemExit(f"{PAGE}: each setting belongs into one table; missing: {missing}")
    meanings = dict(_meanings())
    flags = dict(_flags(typer.main.get_command(app)))

    def row(name: str) -> str:
        variable, field = f"KEEPWARM_{name.upper()}", Settings.model_fields[name]
        flag = f" `{flags[variable]}` |" if variable in flags else " |"
        return f"| `{variable}` | {_default(field)} | {meanings[name]}{_bounds(field)} |{flag}\n"

    def table(found: re.Match[str]) -> str:
        return found[1] + _HEADING + "".join(row(name) for name in found[2].split())

    return _TABLE.sub(table, page)


def _meanings() -> Iterator[tuple[str, str]]:
    """Each setting and the docstring under it. Python keeps none for fields, and pydantic would
    read them from the source at every start of a command.
    """
    (model,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(model, ast.ClassDef)
    for field, text in pairwise(model.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(text.value.value).split())


def _default(field: FieldInfo) -> str:
    """The default as a user would write it; one that depends on the machine is described."""
    if field.default_factory is not None or isinstance(field.default, Path):
        return "see text"
    if field.default is None or field.default == "":
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _bounds(field: FieldInfo) -> str:
    """The range of a number, where it has two ends of its own; times are all bounded alike."""
    least = next((m.ge for m in field.metadata if hasattr(m, "ge")), None)
    most = next((m.le for m in field.metadata if hasattr(m, "le")), None)
    return f" From {least:,} to {most:,}." if least is not None and most is not None else ""


def _flags(command: Any) -> Iterator[tuple[str, str]]:
    """Variable and flag, as the help of each flag names its variable."""
    for verb in getattr(command, "commands", ()):
        yield from _flags(command.get_command(None, verb))
    for parameter in command.params:
        found = re.search(r"env: (KEEPWARM_\w+)", getattr(parameter, "help", None) or "")
        if found:
            yield found[1], parameter.opts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    rendered = render(page)
    if arguments.check and rendered != page:
        raise SystemExit(f"{PAGE} is not what the settings say; run `make docs`")
    if not arguments.check:
        PAGE.write_text(rendered, encoding="utf-8")


if __name__ == "__main__":
    main()
