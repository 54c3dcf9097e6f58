"""Whatever a worker accepts from a run, vLLM's own parser takes for accepted arguments alone."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_no_flag_of_vllm_gets_past_the_list() -> None:
    """In a process of its own: importing vLLM changes the one that does."""
    script = Path(__file__).with_name("engine_flags.py")
    done = subprocess.run(
        [sys.executable, script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
