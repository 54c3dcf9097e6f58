"""A command on a leash: what goes in, what comes out, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from services.node.supervision import SupervisedProcess

GENEROUS_SECONDS = 60.0

# A daemon by the book: fork, a session of its own, fork again. It writes down who it is.
DAEMON = """
import os, signal, sys, time
def note(path):
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
def daemon(path):
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    note(path)
    time.sleep(600)
"""


class Supervised:
    """Starts supervised commands, each with its output in a file, and stops them after the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[tuple[SupervisedProcess, IO[bytes]]] = []

    def start(
        self,
        *command: str,
        environment: dict[str, str] | None = None,
        grace_seconds: float = GENEROUS_SECONDS,
        directory: Path | None = None,
    ) -> SupervisedProcess:
        output = (self._directory / f"output-{len(self._started)}").open("w+b")
        process = SupervisedProcess(
            command,
            environment=dict(os.environ) if environment is None else environment,
            grace_seconds=grace_seconds,
            output=output,
            directory=directory,
        )
        self._started.append((process, output))
        return process

    def python(self, code: str, *arguments: str, **how: object) -> SupervisedProcess:
        return self.start(sys.executable, "-c", code, *arguments, **how)  # type: ignore[arg-type]

    def output_of(self, process: SupervisedProcess) -> str:
        """Its output, after its end."""
        assert process.wait(GENEROUS_SECONDS) is not None
        output = next(output for started, output in self._started if started is process)
        output.seek(0)
        return output.read().decode()

    def stop(self) -> None:
        for process, output in self._started:
            process.stop()
            output.close()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    started = Supervised(tmp_path)
    yield started
    started.stop()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def pid_in(path: Path) -> int:
    wait_for(path.exists)
    return int(path.read_text())


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# What comes out.


@pytest.mark.parametrize("code", [0, 3, 127, 200, 255])
def test_the_commands_exit_code_is_passed_on(code: int, supervised: Supervised) -> None:
    process = supervised.python(f"import sys; sys.exit({code})")
    assert process.wait(GENEROUS_SECONDS) == code
    assert process.exit_code() == code
    assert process.stop() == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_a_signal_ended_says_which(number: int, supervised: Supervised) -> None:
    process = supervised.python(f"import os; os.kill(os.getpid(), {number:d})")
    assert process.wait(GENEROUS_SECONDS) == -number


def test_standard_output_and_error_go_to_the_output(supervised: Supervised) -> None:
    process = supervised.python(
        "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    )
    assert supervised.output_of(process) == "out\nerr\n"


@pytest.mark.parametrize("missing", ["/no/such/command", "no-such-command"])
def test_a_command_that_is_missing_is_127_and_named(missing: str, supervised: Supervised) -> None:
    process = supervised.start(missing)
    assert process.wait(GENEROUS_SECONDS) == 127
    assert supervised.output_of(process).startswith(f"cannot start {missing}: ")


def test_a_directory_that_is_missing_is_127(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised.start("/bin/true", directory=tmp_path / "none")
    assert process.wait(GENEROUS_SECONDS) == 127
    assert str(tmp_path / "none") in supervised.output_of(process)


def test_while_it_runs_there_is_no_exit_code(supervised: Supervised) -> None:
    process = supervised.start("sleep", "600")
    assert process.exit_code() is None
    assert process.wait(0.01) is None
    assert psutil.pid_exists(process.pid)


# What goes in.


@pytest.mark.parametrize(
    "environment",
    [{}, {"A": "1", "LANG": "C.UTF-8"}, {"A": "ł\n=", "LC_ALL": "C", "PATH": "/bin"}],
    ids=["nothing", "some", "odd"],
)
def test_the_environment_is_exactly_what_was_given(
    environment: dict[str, str], supervised: Supervised
) -> None:
    # Python adds to its own environment (PEP 538); `env` shows what it was given.
    process = supervised.start("/usr/bin/env", "-0", environment=environment)
    shown = dict(
        entry.split("=", 1) for entry in supervised.output_of(process).split("\0") if entry
    )
    assert shown == environment


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grace", "5", "--directory", "/nowhere"],
        ["--", "a", "--"],
        ["-x", "", " ", "@file", "ł"],
        ["--help"],
    ],
    ids=["the leash's own flags", "dashes", "odd", "help"],
)
def test_arguments_are_the_commands_own(arguments: list[str], supervised: Supervised) -> None:
    process = supervised.python("import json, sys; print(json.dumps(sys.argv[1:]))", *arguments)
    assert json.loads(supervised.output_of(process)) == arguments


def test_a_command_starts_in_the_given_directory(supervised: Supervised, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    process = supervised.start("/bin/pwd", directory=tmp_path / "there")
    assert supervised.output_of(process).strip() == str(tmp_path / "there")


def test_a_command_starts_in_its_owners_directory_by_default(
    supervised: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else relative paths in its arguments and environment would mean other files.
    monkeypatch.chdir(tmp_path)
    assert supervised.output_of(supervised.start("/bin/pwd")).strip() == str(tmp_path)


def test_standard_input_is_empty(supervised: Supervised) -> None:
    process = supervised.python("import sys; print(repr(sys.stdin.read()))")
    assert supervised.output_of(process) == "''\n"


def test_what_it_makes_is_for_its_owner_alone(supervised: Supervised, tmp_path: Path) -> None:
    supervised.output_of(supervised.start("touch", str(tmp_path / "made")))
    assert (tmp_path / "made").stat().st_mode & 0o077 == 0


def test_a_command_has_a_session_of_its_own(supervised: Supervised) -> None:
    process = supervised.python("import os; print(os.getpid() == os.getsid(0))")
    assert supervised.output_of(process) == "True\n"


def test_a_supervisor_finds_its_library_on_pythonpath_and_hides_it_from_its_command(
    tmp_path: Path, repository: Path
) -> None:
    # As with `pip install --target`, or a cluster's environment modules.
    owner = (
        "import os, keepwarm_start; keepwarm_start.isolate()\n"
        "import sys; from services.node.supervision import SupervisedProcess\n"
        "leashed = SupervisedProcess(['/usr/bin/env'], environment={}, grace_seconds=5, output=1)\n"
        "sys.exit(leashed.wait(60))"
    )
    base = getattr(sys, "_base_executable", sys.executable)
    installed = str(Path(psutil.__file__).parents[1])
    done = subprocess.run(
        [base, "-c", owner],
        env={"PYTHONPATH": f"{repository}{os.pathsep}{installed}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Its end.

ORDERLY = """
import signal, sys, time
def end(*_):
    print("goodbye", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def wait_until_ready(supervised: Supervised, directory: Path) -> None:
    wait_for(lambda: b"ready" in (directory / "output-0").read_bytes())


def test_sigterm_reaches_the_command_which_may_end_in_order(
    supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(ORDERLY)
    wait_until_ready(supervised, tmp_path)
    assert process.stop() == 7
    assert supervised.output_of(process) == "ready\ngoodbye\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_leash_ends_the_command_in_order(
    number: signal.Signals, supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(ORDERLY)
    wait_until_ready(supervised, tmp_path)
    os.kill(process.pid, number)
    assert process.wait(GENEROUS_SECONDS) == 7


def test_terminate_returns_at_once_and_stop_then_waits(
    supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(ORDERLY)
    wait_until_ready(supervised, tmp_path)
    process.terminate()
    process.terminate()
    assert process.stop() == 7
    process.terminate()


def test_however_many_signals_come_the_exit_code_is_the_commands(
    supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(ORDERLY)
    wait_until_ready(supervised, tmp_path)
    while process.exit_code() is None:
        process.terminate()
    assert process.exit_code() == 7


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(
    supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(STUBBORN, grace_seconds=0.2)
    wait_until_ready(supervised, tmp_path)
    assert process.stop() == -signal.SIGKILL


def test_stopping_twice_is_as_good_as_once(supervised: Supervised) -> None:
    process = supervised.start("sleep", "600")
    assert process.stop() == process.stop()


def test_kill_ends_the_command_and_what_it_started_at_once(
    supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(
        DAEMON + "daemon(sys.argv[1]); time.sleep(600)", str(tmp_path / "daemon")
    )
    daemon = pid_in(tmp_path / "daemon")
    process.kill()
    assert process.exit_code() == -signal.SIGKILL
    wait_for(lambda: gone(daemon))


def test_killing_what_has_ended_is_quiet(supervised: Supervised) -> None:
    process = supervised.start("/bin/true")
    assert process.wait(GENEROUS_SECONDS) == 0
    process.kill()


# Nothing stays behind.


def test_daemons_that_left_the_session_end_with_a_command_that_ends(
    supervised: Supervised, tmp_path: Path
) -> None:
    paths = [tmp_path / f"daemon-{number}" for number in range(3)]
    code = DAEMON + (
        "import time\n"
        "for path in sys.argv[1:]: daemon(path)\n"
        "while not all(map(os.path.exists, sys.argv[1:])): time.sleep(0.01)\n"
    )
    process = supervised.python(code, *map(str, paths))
    assert process.wait(GENEROUS_SECONDS) == 0
    assert all(gone(pid_in(path)) for path in paths)


def test_daemons_end_with_a_command_that_is_stopped(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised.python(
        DAEMON + "daemon(sys.argv[1]); time.sleep(600)", str(tmp_path / "daemon")
    )
    daemon = pid_in(tmp_path / "daemon")
    process.stop()
    assert gone(daemon)


ORPHANS = """
import os, sys, time
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.05)  # until its parent has ended
        os._exit(0)
    os.wait()
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""


def test_orphans_that_ended_are_reaped_while_the_command_runs(
    supervised: Supervised, tmp_path: Path
) -> None:
    process = supervised.python(ORPHANS, "600")
    wait_until_ready(supervised, tmp_path)
    (supervisor,) = psutil.Process(process.pid).children()
    wait_for(lambda: len(supervisor.children()) == 1)
    assert process.exit_code() is None


def test_reaping_orphans_loses_no_exit_code_of_the_command(supervised: Supervised) -> None:
    # The command and its orphans end at about the same time.
    assert supervised.python(ORPHANS, "0.05").wait(GENEROUS_SECONDS) == 7


OWNER = """
import os, subprocess, sys, time
from services.node.supervision import SupervisedProcess
leashed = SupervisedProcess(
    [sys.executable, "-c", sys.argv[1], *sys.argv[2:]],
    environment=dict(os.environ), grace_seconds=0.2, output=subprocess.DEVNULL,
)
time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["owner", "guard", "holder", "owner, guard", "owner, holder"])
def test_whichever_is_killed_the_command_and_its_daemons_are_gone(
    tmp_path: Path, repository: Path, killed: str
) -> None:
    code = DAEMON + "daemon(sys.argv[1]); note(sys.argv[2]); time.sleep(600)"
    paths = [tmp_path / "daemon", tmp_path / "command"]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, code, *map(str, paths)], cwd=repository)
    try:
        pids = [pid_in(path) for path in paths]
        (guard,) = psutil.Process(owner.pid).children()
        (supervisor,) = guard.children()
        for name, process in (("owner", owner), ("guard", guard), ("holder", supervisor)):
            if name in killed:
                process.kill()
        for pid in (*pids, guard.pid, supervisor.pid):
            wait_for(lambda pid=pid: gone(pid))
    finally:
        owner.kill()
        owner.wait()


def test_an_early_warning_to_all_processes_of_a_job_ends_no_command_and_no_leash(
    supervised: Supervised,
) -> None:
    running = supervised.python("import time; print('up', flush=True); time.sleep(600)")
    deadline = time.monotonic() + GENEROUS_SECONDS
    while (command := running.command()) is None or "time.sleep(600)" not in str(command.cmdline()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    assert len(family) == 3
    for process in family:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
    time.sleep(0.5)
    assert running.exit_code() is None
    assert all(process.is_running() for process in family)
