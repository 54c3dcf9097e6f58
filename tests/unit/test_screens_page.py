"""docs/screens.md shows what the commands draw, within 80 columns."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_page_is_what_is_drawn(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup/screens_page.py", "--check"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_screen_fits_eighty_columns(repository: Path) -> None:
    page = (repository / "docs" / "screens.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- screen: ([a-z ]+) -->\n```\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == page.count("<!-- screen:")
    for name, block in blocks:
        if "piped" not in name:  # there nothing is wrapped
            assert max(map(len, block.splitlines())) <= 80, name
