"""A child process that cannot outlive its owner, nor leave processes that it started.

`python keepwarm_start.py services.node.supervision --grace 10 -- COMMAND…` runs COMMAND in a
session of its own and holds one end of a pipe. When the owner ends, even by SIGKILL, the pipe
closes. Then, or on SIGTERM, the command gets SIGTERM, and SIGKILL after `--grace` seconds. When the
command has ended, every process that it ever started is killed, daemons that left its session
included: the supervisor is their subreaper (prctl(2)). There are two processes, a guard and the
supervisor. Each ends the command if the other is killed, so nothing remains whichever process dies
first, even if its owner dies at the same moment.

`supervise` does the same for a child of the calling process: an engine that was forked, not
executed (services/contexts/fork_server.py).

A RabbitMQ node starts a port mapper as a daemon; an engine starts processes that hold GPU memory.
This module imports the standard library and psutil only, and owns nothing that could fail.
"""

import argparse
import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import psutil

from keepwarm_start import python_command

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Batch systems may send early warnings to every process of a job. Only processes that drain use
# them.
_WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_KILLED_SECONDS = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class SupervisedProcess:
    """A supervised command, as its owner sees it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        grace_seconds: float,
        output: IO[bytes] | int,
        directory: Path | None = None,
    ) -> None:
        """Start it, in `directory` or else in its owner's.

        Standard output and error go to `output`; `environment` is its whole environment.
        """
        self._grace_seconds = grace_seconds
        self._process = subprocess.Popen(
            [
                *python_command("services.node.supervision", "--grace", str(grace_seconds)),
                *(() if directory is None else ("--directory", str(directory))),
                *("--", *command),
            ],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            # Only this user can open the sockets and files that it makes.
            umask=0o077,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def command(self) -> psutil.Process | None:
        """The supervised command's process; None once it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            supervisor = psutil.Process(self._process.pid).children()[0]
            return supervisor.children()[0]
        return None

    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended the command."""
        code = self._process.poll()
        return None if code is None else from_shell(code)

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """The exit code; None after the time-out."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_seconds)
        return self.exit_code()

    def terminate(self) -> None:
        """Send SIGTERM, and return at once."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> int:
        """SIGTERM; SIGKILL after the grace period. Returns when all its processes have ended."""
        self.terminate()
        self._release()
        try:
            return from_shell(self._process.wait(self._grace_seconds + 10))
        except subprocess.TimeoutExpired:
            _kill_all(psutil.Process(self._process.pid))
            self._process.kill()
            # Do not wait for a process that hangs in the kernel (a dead NFS server, a GPU's
            # driver).
            with contextlib.suppress(subprocess.TimeoutExpired):
                return from_shell(self._process.wait(_KILLED_SECONDS))
            return -signal.SIGKILL

    def _release(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def kill(self) -> None:
        """Send SIGKILL to the command and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill_all(psutil.Process(self._process.pid))
        self._release()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILLED_SECONDS)


def from_shell(code: int) -> int:
    """The exit code of `subprocess`: the supervisor reports signal N as 128 + N, as shells do."""
    return 128 - code if code - 128 in signal.valid_signals() else code


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _kill_all(ancestor: psutil.Process) -> None:
    """Send SIGKILL until no process is left: one may fork meanwhile."""
    for _ in range(50):
        remaining = _descendants(ancestor)
        if not remaining:
            return
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=0.2)


def _given_environment() -> dict[bytes, bytes]:
    """Our environment at the start: Python adds LC_CTYPE to its own if no locale is set."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    return dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, instead of init."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """The kernel sends `number` to this process when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def _guard(supervisor: int) -> int:
    """Wait for the supervisor, forward signals to it, and kill the processes that it left."""
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda received, _: os.kill(supervisor, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # Not reaped yet: until signals are ignored, no other process can get its pid.
    os.waitid(os.P_PID, supervisor, os.WEXITED | os.WNOWAIT)
    _ignore_stop_signals()
    _, status = os.waitpid(supervisor, 0)
    # If it was killed, its orphans were reparented to the next subreaper, this process.
    _kill_all(psutil.Process())
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


class ChildProcess(Protocol):
    """A child process; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def supervise(start: Callable[[], ChildProcess], owner: int, grace_seconds: float) -> int:
    """Supervise the process that `start` returns until it ends, or until `owner`, a descriptor,
    becomes readable: then send SIGTERM, and SIGKILL after the grace period. Returns the exit code;
    128 + N after signal N.

    The process must lead its own session, and call `die_with_parent`.
    """
    adopt_orphans()
    guard = os.getpid()
    # A signal before its handler is installed would end the guard, and its owner would assume
    # that the command has ended while the supervisor still ends it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    supervisor = os.fork()
    if supervisor:
        return _guard(supervisor)
    adopt_orphans()
    die_with_parent(signal.SIGTERM)
    stop_signals: list[int] = [] if os.getppid() == guard else [signal.SIGTERM]
    wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_writer)
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda received, _: stop_signals.append(received))
    # Before the command starts, which would inherit it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    child = start()
    with selectors.DefaultSelector() as selector:
        selector.register(owner, selectors.EVENT_READ, "owner")
        selector.register(wake_reader, selectors.EVENT_READ, "signal")
        while child.poll() is None and not stop_signals:
            for key, _ in selector.select():
                # Nothing is written to the pipe: readable means that the owner has closed it.
                if key.data == "owner":
                    stop_signals.append(signal.SIGTERM)
                else:
                    os.read(wake_reader, 512)
                    _reap_orphans(child)
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_seconds)
        child.kill()
        child.wait()
    _kill_all(psutil.Process())
    code = child.wait()
    _ignore_stop_signals()
    return code if code >= 0 else 128 - code


def _reap_orphans(child: ChildProcess) -> None:
    """Reap every ended process but `child`, whose exit code its own `poll` must see."""
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        if ended.si_pid == child.pid:
            return
        os.waitpid(ended.si_pid, 0)


def _ignore_stop_signals() -> None:
    """Python resets signals to their defaults when it ends: a signal after that would replace the
    exit code.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--grace", type=float, default=10.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--directory", type=Path, help="where the command starts")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    # The command inherits this: one that drains installs a handler, and an engine continues.
    for number in _WARNING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def start() -> ChildProcess:
        return subprocess.Popen(
            arguments.command,
            stdin=subprocess.DEVNULL,
            cwd=arguments.directory,
            env=_given_environment(),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    try:
        return supervise(start, sys.stdin.fileno(), arguments.grace)
    except OSError as error:
        sys.stderr.write(f"cannot start {arguments.command[0]}: {error}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main())
