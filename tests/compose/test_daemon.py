"""The tests' own daemon goes with its test, whatever ends that."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.integration.conftest import wait_until

_HOLD = """
import sys, time
from pathlib import Path
from tests.compose.daemon import Daemon
with Daemon(Path(sys.argv[1])).running(network_of_its_own=True):
    print("up", flush=True)
    time.sleep(600)
"""


def of(directory: Path) -> list[psutil.Process]:
    """Every process that has the daemon's directory on its command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(directory) in word for word in process.info["cmdline"] or ())
    ]


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short name: the path of a unix socket may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kw-") as name:
        yield Path(name) / "docker"


def test_nothing_stays_of_a_daemon_whose_test_is_killed(directory: Path) -> None:
    command = [sys.executable, "-c", _HOLD, directory]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holding:
        assert holding.stdout is not None and holding.stdout.readline() == "up\n"
        assert any("containerd" in process.name() for process in of(directory))
        holding.kill()
    wait_until(lambda: not of(directory), "all of it gone", 120)
    assert str(directory) not in Path("/proc/self/mounts").read_text()
