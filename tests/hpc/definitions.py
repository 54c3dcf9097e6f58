"""Apptainer's definition files, taken apart as far as tests need it."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

APPTAINER = REPOSITORY / "apptainer"
_SECTION = re.compile(r"^%([a-z]+)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Definition:
    header: dict[str, str]
    sections: dict[str, str]

    @property
    def files(self) -> list[tuple[Path, str]]:
        """What is copied from the repository, and where to in the image."""
        pairs = [line.split() for line in self.sections["files"].splitlines() if line.strip()]
        return [(REPOSITORY / source, target) for source, target in pairs]


def read_definition(file: Path) -> Definition:
    """Header and sections of a definition with one stage."""
    head, *rest = _SECTION.split(file.read_text(encoding="utf-8"))
    pairs = re.findall(r"^(\w+): (\S+)$", head, re.MULTILINE)
    names, texts = rest[::2], rest[1::2]
    assert len(set(names)) == len(names), f"{file}: a section comes twice"
    return Definition(dict(pairs), dict(zip(names, texts, strict=True)))
