"""docs/settings.md says what the settings model says."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.contracts import Settings


@pytest.fixture
def checked(repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup/settings_page.py", "--check"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_is_what_the_settings_say(checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 0, checked.stderr


def test_every_setting_says_what_it_means(repository: Path) -> None:
    rows = [
        [cell.strip() for cell in line.split("|")]
        for line in (repository / "docs" / "settings.md").read_text().splitlines()
        if line.startswith("| `KEEPWARM_")
    ]
    # Batch jobs have variables of their own, which no service reads.
    assert {row[1] for row in rows} >= {f"`KEEPWARM_{n.upper()}`" for n in Settings.model_fields}
    for _, variable, default, meaning, *_ in rows:
        assert default and len(meaning) > 8, variable
