"""Interpreters that have the tests' doubles in the place of what is installed."""

import sys
import sysconfig
from pathlib import Path

DOUBLES = Path(__file__).resolve().parent / "doubles"


def interpreter(directory: Path, *first: Path) -> Path:
    """A virtual environment's python. It looks for modules in `first`, by default in the doubles,
    and then where this python does; PYTHONPATH would be searched last.
    """
    python = directory / "bin" / "python"
    if python.exists():
        return python
    installed = sysconfig.get_path("purelib")
    packages = directory / f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    packages = packages / "site-packages"
    packages.mkdir(parents=True)
    lines = [*map(str, first or (DOUBLES,)), f"import site; site.addsitedir({installed!r})"]
    (packages / "first.pth").write_text("\n".join(lines) + "\n")
    base = Path(sys._base_executable)
    (directory / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    python.parent.mkdir()
    python.symlink_to(base)
    return python
