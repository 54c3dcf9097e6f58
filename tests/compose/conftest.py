"""A daemon with all images, made once; and the services of docker-compose.yml, up."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.node.runtime_dir import take_lock
from tests.compose import images
from tests.compose.daemon import Daemon
from tests.compose.stack import Stack
from tests.conftest import DEMO_MODEL

_PREFIX = "keepwarm-compose-"


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """Not running. KEEPWARM_TEST_DOCKER=DIRECTORY keeps its images there for the next time."""
    assert os.geteuid() == 0, "a Docker daemon is root's"
    # Fixtures are torn down at Ctrl-C; so at SIGTERM, and where a shell has us ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    kept = os.environ.get("KEEPWARM_TEST_DOCKER")
    if kept:
        yield Daemon(Path(kept))
        return
    _remove_what_killed_tests_left()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = take_lock(directory / "lock")
    try:
        yield Daemon(directory)
    finally:
        shutil.rmtree(directory)
        assert lock is not None
        os.close(lock)


def _remove_what_killed_tests_left() -> None:
    """Files alone: all else went with the test."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        lock = take_lock(directory / "lock")
        if lock is not None:
            shutil.rmtree(directory)
            os.close(lock)


@pytest.fixture(scope="session")
def project(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """With secrets, and images for all services."""
    assert DEMO_MODEL.is_dir(), "make setup makes the demo model"
    stack = Stack(tmp_path_factory.mktemp("compose") / "keepwarm", daemon).with_secrets()
    with daemon.running(network_of_its_own=False):
        images.make_base(daemon)
        with ThreadPoolExecutor() as both:  # each waits for the network most of the time
            stand_ins = both.submit(images.make_stand_ins, daemon)
            own = both.submit(stack.compose, "build", *images.OWN)
            stand_ins.result()
            own.result()
    return stack


@pytest.fixture(scope="session")
def stack(project: Stack, daemon: Daemon) -> Iterator[Stack]:
    """All services of the profile cpu, up."""
    with daemon.running(network_of_its_own=True):
        try:
            project.compose("up", "-d")
            yield project
        finally:
            # Kept for a while with pytest's temporary files.
            logs = project.compose("logs", "--no-color", check=False)
            (project.directory / "services.log").write_text(logs)
            project.compose("down", "--volumes", "--timeout", "60", check=False)
