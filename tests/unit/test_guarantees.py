"""docs/guarantees.md names the test that proves each promise: it has to be there."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "guarantees.md").read_text(encoding="utf-8")
# The last column of the tables: files, each with the names, or parts of names, of its tests.
CELLS = [line.rsplit("|", 2)[1] for line in PAGE.splitlines() if re.search(r"\|.*\.py`.*\|$", line)]


def named(cell: str) -> list[tuple[Path, str]]:
    found, file = [], None
    for token in re.findall(r"`([^`]+)`", cell):
        if token.endswith(".py"):
            # Without a folder, it is one that breaks things: not a unit test.
            places = ("", "tests/integration", "tests/e2e")
            (file,) = (p for place in places if (p := REPOSITORY / place / token).exists())
            found.append((file, ""))
        else:
            assert file is not None, cell
            found.append((file, token))
    return found


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "`" in cell])
def test_a_guarantee_names_tests_that_exist(cell: str) -> None:
    for file, name in named(cell):
        tests = re.findall(r"def test_(\w+)", file.read_text(encoding="utf-8"))
        parts = [re.escape(part) for part in name.strip("…").split("…")]
        assert any(re.search(".*".join(parts), test) for test in tests), (file.name, name)


def test_the_page_names_tests() -> None:
    assert len(CELLS) > 25
