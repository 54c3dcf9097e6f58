"""A short one of benchmarks/chaos.py: everything breaks, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import DEMO_MODEL, REPOSITORY


def test_nothing_is_lost_or_doubled_while_everything_breaks(tmp_path: Path) -> None:
    assert DEMO_MODEL.is_dir(), "the demo model is missing: `make setup` makes it"
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "benchmarks" / "chaos.py")),
            *("--claims", "2000", "--poison", "1", "--workers", "2", "--seed", "3"),
            *(
                "--claim-seconds",
                "0.01",
                "--fault-seconds",
                "2",
                "--limit-seconds",
                "400",
                "--json",
                str(figures),
            ),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(figures.read_text())
    assert run["claims"] == 2000
    assert sum(run["faults"].values()) >= 5
    for broken in ("lost", "doubled", "differing", "wrongly dead"):
        assert run[broken] == 0, done.stdout
