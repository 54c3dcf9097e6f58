"""A forked child under supervision."""

import subprocess
import sys
from pathlib import Path

# The pipe says that its owner is gone as soon as the child ignores SIGTERM.
DEAF = """
import os, signal, sys, time
from services.contexts.fork_server import ForkedProcess
from services.node.supervision import supervise

owner, other_end = os.pipe()

def deaf():
    os.close(owner)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(other_end, b"deaf")
    time.sleep(600)

sys.exit(supervise(lambda: ForkedProcess(deaf), owner, 0.2))
"""


def test_a_forked_child_that_ignores_sigterm_is_killed_after_its_grace(repository: Path) -> None:
    holding = subprocess.run(
        [sys.executable, "-c", DEAF], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert (holding.returncode, holding.stderr) == (128 + 9, "")


IMPORTS = """
import os, sys
import services.contexts.fork_server

needless = {"pydantic", "structlog", "services.contracts"} & {*sys.modules}
threads = os.listdir("/proc/self/task")
sys.exit(f"{needless}, {len(threads)} threads" if needless or len(threads) > 1 else 0)
"""


def test_the_fork_server_imports_nothing_that_an_engines_interpreter_may_lack(
    repository: Path,
) -> None:
    importing = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert (importing.returncode, importing.stderr) == (0, "")
