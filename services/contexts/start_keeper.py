"""Finding this node's keeper, or starting one."""

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from keepwarm_start import python_command
from services.contexts.protocol import DescribeDevice, KeeperChannel
from services.contracts import Settings
from services.contracts.errors import EngineStartError, KeeperError
from services.contracts.settings import METRICS_OFF
from services.node.device import Device, find_device
from services.node.runtime_dir import (
    is_locked,
    keeper_lock,
    keeper_socket,
    open_log,
    open_runtime_dir,
    quoted_tail,
)
from services.node.supervision import SupervisedProcess

_POLL_SECONDS = 0.02
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 20.0
# On a slow machine the imports alone may take long. A keeper that is there, or coming, has this.
_SLOW_START_SECONDS = 60.0
_RETRY_SECONDS = 2.0
# What a keeper reads; flags and callers may have chosen them, and not the environment.
_KEEPER_SETTINGS = {
    *("runtime_dir", "cache_dir", "cache_gib", "context_idle_seconds", "context_memory_gib"),
    *("engine_start_timeout_seconds", "grace_seconds", "walltime_seconds"),
    *("log_level", "log_format"),
}
_COMMAND = python_command("services.cli.main", "keeper")


def connected(directory: Path) -> KeeperChannel | None:
    """A connection to the keeper of this runtime directory; None where there is none, or one that
    takes no connections: so many wait that the kernel lets us wait, too.
    """
    path = keeper_socket(directory)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_CONNECT_SECONDS)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return KeeperChannel(connection)


def open_keeper(
    settings: Settings, stopped: Callable[[], bool] = lambda: False
) -> KeeperChannel | None:
    """A connection to this node's keeper, which is started if there is none, and then outlives us;
    where that is not for us to do, it is waited for. None when `stopped` said so meanwhile.

    Raises KeeperError when it does not come up.
    """
    directory = open_runtime_dir(settings.runtime_dir)
    log_file = directory / "keeper.log"
    retry_at = 0.0
    keeper_pipe: IO[bytes] | None = None

    def is_starting() -> bool:
        # It never writes: readable means that it has ended.
        lives = keeper_pipe is not None and not select.select([keeper_pipe], [], [], 0)[0]
        return lives or is_locked(keeper_lock(directory))

    def keep_waiting() -> bool:
        # One that finds another, or one that is about to end, ends at once: there is a lock.
        nonlocal retry_at, keeper_pipe
        if settings.start_keeper and time.monotonic() >= retry_at and not is_starting():
            retry_at = time.monotonic() + _RETRY_SECONDS
            keeper_pipe = started.enter_context(_start(settings, log_file))
        return not stopped()

    with contextlib.ExitStack() as started:
        return _wait(directory, log_file, keep_waiting, is_starting)


@contextlib.contextmanager
def temporary_keeper(
    settings: Settings, log_file: Path, stopped: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Where this node has no keeper, one that ends with the block, and its engines with it. One
    that is there already is left alone, and its engines stay. It is not waited for once `stopped`
    says so.
    """
    directory = open_runtime_dir(settings.runtime_dir)
    channel = connected(directory)
    if channel is not None:
        channel.close()
        yield
        return
    with open_log(log_file) as output:
        keeper = SupervisedProcess(
            _COMMAND,
            environment=_environment(settings),
            # It drains within its grace period; the leash comes after it.
            grace_seconds=settings.grace_seconds + 10,
            output=output,
        )
    try:
        channel = _wait(
            directory, log_file, lambda: not stopped(), lambda: keeper.exit_code() is None
        )
        if channel is not None:
            channel.close()
        yield
    finally:
        keeper.stop()


def node_device(settings: Settings) -> Device:
    """What engines of this node compute on. A keeper that is a service of its own may see a GPU
    that we do not see, so it is asked; otherwise we look ourselves.

    Raises EngineStartError where a GPU that is named is not there, KeeperError without a keeper.
    """
    if settings.start_keeper:
        return find_device()
    channel = open_keeper(settings)
    assert channel is not None
    with contextlib.closing(channel):
        reply = channel.ask(DescribeDevice(), _ANSWER_SECONDS)
    if reply is None or reply.device is None:
        raise EngineStartError(
            (reply and reply.error) or "the keeper ended before it told its device"
        )
    return reply.device


def _wait(
    directory: Path,
    log_file: Path,
    keep_waiting: Callable[[], bool],
    is_starting: Callable[[], bool],
) -> KeeperChannel | None:
    begun = time.monotonic()
    while (channel := connected(directory)) is None:
        if not keep_waiting():
            return None
        waited = time.monotonic() - begun
        if waited > _SLOW_START_SECONDS or (waited > _ANSWER_SECONDS and not is_starting()):
            raise KeeperError(
                f"no keeper answers in {directory}. One that is a service of its own "
                "(KEEPWARM_START_KEEPER=false) must run, as the same user and with the same "
                f"KEEPWARM_RUNTIME_DIR; the log of any other ended with:\n{quoted_tail(log_file)}"
            )
        time.sleep(_POLL_SECONDS)
    return channel


def _start(settings: Settings, log_file: Path) -> IO[bytes]:
    """In a session of its own and as no child of ours: it is to outlive us (setsid(1)). What it
    holds the other end of as long as it lives.
    """
    keeper_pipe, keeper_end = os.pipe()
    with open_log(log_file) as output, os.fdopen(keeper_end, "wb"):
        subprocess.run(
            ["setsid", "--fork", *_COMMAND, "--until-idle"],  # noqa: S607
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(settings),
            cwd="/",  # it outlives the directory that we are in
            pass_fds=(keeper_end,),
            check=False,  # whether it came up is seen at its socket
        )
    return os.fdopen(keeper_pipe, "rb")


def without_secrets() -> dict[str, str]:
    """Our environment, for processes that have no use for passwords."""
    return {name: value for name, value in os.environ.items() if "PASSWORD" not in name.upper()}


def _environment(settings: Settings) -> dict[str, str]:
    """Ours without secrets, which a keeper has no use for, and with the settings as they are. Our
    address for metrics is ours: whoever wants a keeper's runs one as a service.
    """
    chosen = settings.model_dump(mode="json", include=_KEEPER_SETTINGS, exclude_none=True)
    chosen["metrics_address"] = METRICS_OFF
    return {
        **without_secrets(),
        **{f"KEEPWARM_{name.upper()}": str(value) for name, value in chosen.items()},
    }
