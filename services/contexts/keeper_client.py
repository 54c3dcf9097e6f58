"""A client of this node's keeper: connects to it, starts it if there is none, and asks it for its
engines, to stop some, or to end.
"""

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from keepwarm_start import python_command
from services.contexts.protocol import (
    OTHER_VERSION,
    ContextRecord,
    DescribeDevice,
    Drain,
    Evict,
    KeeperChannel,
    KeeperReply,
    Status,
)
from services.contracts import Settings
from services.contracts.errors import EngineStartError, KeeperError
from services.contracts.settings import METRICS_OFF
from services.node.device import Device, find_device
from services.node.runtime_dir import (
    is_locked,
    keeper_lock,
    keeper_socket,
    log_tail,
    open_log,
    open_runtime_dir,
)
from services.node.supervision import SupervisedProcess

_POLL_SECONDS = 0.02
_CONNECT_SECONDS = 2.0
# For a keeper that runs or starts; on a slow machine the imports alone may take long.
_ANSWER_SECONDS, _SLOW_START_SECONDS = 20.0, 60.0
_REQUEST_SECONDS = 10.0
_EVICT_SECONDS = 60.0
_END_SECONDS, _END_POLL_SECONDS = 10.0, 0.1
_RETRY_SECONDS = 2.0
# The settings that a keeper reads. They are passed on, because flags may have set them.
_KEEPER_SETTINGS = {
    *("runtime_dir", "cache_dir", "cache_gib", "context_idle_seconds", "context_memory_gib"),
    *("engine_start_timeout_seconds", "grace_seconds", "walltime_seconds"),
    *("log_level", "log_format"),
}
_COMMAND = python_command("services.cli.main", "keeper")


def connect(directory: Path) -> KeeperChannel | None:
    """A connection to the keeper of this runtime directory; None if there is no keeper, or if it
    does not accept connections within two seconds.
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
    """A connection to this node's keeper. If there is none, one is started that outlives this
    process; with KEEPWARM_START_KEEPER=false it is waited for instead. None when `stopped` became
    true meanwhile.

    Raises KeeperError when no keeper answers.
    """
    directory = open_runtime_dir(settings.runtime_dir)
    log_file = directory / "keeper.log"
    with contextlib.ExitStack() as started:

        def start() -> Callable[[], bool]:
            keeper_pipe = started.enter_context(_start(settings, log_file))
            # The keeper never writes to the pipe: readable means that it has ended.
            return lambda: not select.select([keeper_pipe], [], [], 0)[0]

        return _wait_for_keeper(
            directory, log_file, start if settings.start_keeper else None, stopped
        )


@contextlib.contextmanager
def temporary_keeper(
    settings: Settings, log_file: Path, stopped: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """If this node has no keeper, start one that ends with the block, and its engines with it. It
    lends no broker, which another run would lose then. A keeper that is there already is used, and
    stays. Yields whether one was started. Stops waiting
    for it when `stopped` becomes true.

    Raises KeeperError when no keeper answers.
    """
    directory = open_runtime_dir(settings.runtime_dir)
    with contextlib.ExitStack() as started:
        keeper: SupervisedProcess | None = None

        def is_running() -> bool:
            return keeper is not None and keeper.exit_code() is None

        def start() -> Callable[[], bool]:
            nonlocal keeper
            with open_log(log_file) as output:
                keeper = SupervisedProcess(
                    [*_COMMAND, "--no-broker"],
                    environment=_environment(settings),
                    # The keeper drains within its own grace period; the supervisor's ends later.
                    grace_seconds=settings.grace_seconds + 10,
                    output=output,
                )
            started.callback(keeper.stop)
            return is_running

        channel = _wait_for_keeper(directory, log_file, start, stopped)
        if channel is not None:
            channel.close()
        yield is_running()


def node_device(settings: Settings) -> Device:
    """The device that engines of this node compute on. A keeper that runs as a service may see a
    GPU that this process does not see, so then the keeper is asked.

    Raises EngineStartError if a GPU that is named does not exist, KeeperError without a keeper.
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


def engines(directory: Path, timeout_seconds: float = _REQUEST_SECONDS) -> Sequence[ContextRecord]:
    """The engines of the keeper of this runtime directory, the oldest first; none without a keeper.

    Raises KeeperError when it does not answer in time, or is of a version that cannot tell.
    """
    for _ in range(2):
        channel = connect(directory)
        if channel is None:
            return ()
        with contextlib.closing(channel):
            reply = channel.ask(Status(), timeout_seconds)
        if reply is not None:
            return reply.engines
        # It has ended meanwhile; or it does not know the request, and closed the connection.
    raise KeeperError(OTHER_VERSION)


def evict(
    settings: Settings, wanted: tuple[str, ...], stopped: Callable[[], bool] = lambda: False
) -> tuple[str, ...]:
    """Stop engines, given by name or context id. Returns the names of those that ended; none if
    there is no keeper, or if `stopped` becomes true before it has answered.

    Raises KeeperError when it does not answer.
    """
    return _request(settings, Evict(wanted=wanted), _drain_seconds(settings), stopped).done


def drain(settings: Settings) -> tuple[str, ...]:
    """Stop every engine of this node, and then its keeper. Returns the names of the engines that
    ended, when the keeper has ended.

    Raises KeeperError when it does not answer.
    """
    ended = _request(settings, Drain(), _drain_seconds(settings)).done
    lock = keeper_lock(open_runtime_dir(settings.runtime_dir))
    deadline = time.monotonic() + _END_SECONDS
    while is_locked(lock) and time.monotonic() < deadline:
        time.sleep(_END_POLL_SECONDS)
    return ended


def check_keeper(settings: Settings, stopped: Callable[[], bool]) -> None:
    """Raises KeeperError when this node's keeper does not answer."""
    _request(settings, DescribeDevice(), _REQUEST_SECONDS, stopped)


def _drain_seconds(settings: Settings) -> float:
    """Workers have up to 60 % of the grace period to finish, and engines then all of it to end."""
    return 2 * settings.grace_seconds + _EVICT_SECONDS


def _request(
    settings: Settings,
    request: DescribeDevice | Evict | Drain,
    seconds: float,
    stopped: Callable[[], bool] = lambda: False,
) -> KeeperReply:
    channel = connect(open_runtime_dir(settings.runtime_dir))
    if channel is None:
        return KeeperReply()
    with contextlib.closing(channel):
        return channel.ask(request, seconds, stopped) or KeeperReply()


def _wait_for_keeper(
    directory: Path,
    log_file: Path,
    start: Callable[[], Callable[[], bool]] | None,
    stopped: Callable[[], bool],
) -> KeeperChannel | None:
    """Connect to the keeper; None when `stopped` became true. `start` starts one, with its output
    in `log_file`, and returns what tells whether it still runs.
    """
    begun = time.monotonic()
    retry_at = 0.0

    def is_running() -> bool:
        return False

    while (channel := connect(directory)) is None:
        if stopped():
            return None
        now = time.monotonic()
        may_start = start is not None and now >= retry_at
        is_late = now - begun > _ANSWER_SECONDS
        if may_start or is_late:
            own = is_running()
            other = not own and is_locked(keeper_lock(directory))
            # A keeper that finds the directory locked, by another or by one that is ending, ends
            # at once. So wait for the other one's end, and try again.
            if start is not None and may_start and not (own or other):
                if not retry_at:
                    begun = now  # the wait for the other one is over
                retry_at = now + _RETRY_SECONDS
                is_running = start()
            elif now - begun > _SLOW_START_SECONDS or (is_late and not (own or other)):
                raise KeeperError(_no_answer(directory, log_file, other, start is None))
        time.sleep(_POLL_SECONDS)
    return channel


def _no_answer(directory: Path, log_file: Path, is_other: bool, is_service: bool) -> str:
    if is_other:
        return (
            f"the keeper in {directory} does not answer: it may still be stopping its engines. "
            "Rerun the command later; if that fails again, end the process `keepwarm keeper`"
        )
    if is_service:
        return (
            f"no keeper answers in {directory}. It must run as a service of its own "
            "(KEEPWARM_START_KEEPER=false), as the same user and with the same KEEPWARM_RUNTIME_DIR"
        )
    last = "".join(log_tail(log_file, 1)) or "(nothing)"
    return f"no keeper answers in {directory}. The last line of its log, {log_file}, is: {last}"


def _start(settings: Settings, log_file: Path) -> IO[bytes]:
    """Start a keeper in a session of its own that outlives this process (setsid(1)). Returns a pipe
    whose other end the keeper holds until it ends.
    """
    keeper_pipe, keeper_end = os.pipe()
    with open_log(log_file) as output, os.fdopen(keeper_end, "wb"):
        subprocess.run(
            ["setsid", "--fork", *_COMMAND, "--until-idle"],  # noqa: S607
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(settings),
            cwd="/",  # it may outlive the current directory
            pass_fds=(keeper_end,),
            check=False,  # its socket shows whether it has started
        )
    return os.fdopen(keeper_pipe, "rb")


def environment_without_passwords() -> dict[str, str]:
    """The environment of this process without passwords, for processes that need none."""
    return {name: value for name, value in os.environ.items() if "PASSWORD" not in name.upper()}


def _environment(settings: Settings) -> dict[str, str]:
    """A keeper's environment: this one without passwords, with the settings in force, and without
    this process's metrics port. Run a keeper as a service to get its metrics.
    """
    chosen = settings.model_dump(mode="json", include=_KEEPER_SETTINGS, exclude_none=True)
    chosen["metrics_address"] = METRICS_OFF
    return {
        **environment_without_passwords(),
        **{f"KEEPWARM_{name.upper()}": str(value) for name, value in chosen.items()},
    }
