import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.node.signals import on_stop_signal

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _handlers_are_set_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    asked: queue.Queue[int] = queue.Queue()
    on_stop_signal(asked.put)
    os.kill(os.getpid(), number)
    assert asked.get(timeout=60) == number


SENDS_ITSELF = """
import os, signal, sys, threading
from services.node.signals import on_stop_signal

asked = threading.Event()

def stop(number):
    print("asked", number, flush=True)
    asked.set()

on_stop_signal(stop)
for name in sys.argv[1:]:
    os.kill(os.getpid(), signal.Signals[name])
    asked.wait()
print("alive", flush=True)
"""
INTERRUPTED = """
import os, signal, threading
from services.node.signals import on_stop_signal

stop = threading.Event()
on_stop_signal(lambda _: stop.set())
with stop._cond:  # as in the midst of `wait`
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass  # the handler runs here
stop.wait()
print("stopped", flush=True)
"""


IGNORES = """
import os, signal
from services.node.signals import on_stop_signal

signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
on_stop_signal(lambda _: print("asked", flush=True))
os.kill(os.getpid(), signal.SIGHUP)
print("alive", flush=True)
"""


def test_nohup_is_respected(repository: Path) -> None:
    assert told(IGNORES, repository) == (0, "alive\n")


def told(code: str, repository: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and words of a process that runs this code."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_what_stops_may_take_a_lock_that_the_main_thread_holds(repository: Path) -> None:
    assert told(INTERRUPTED, repository) == (0, "stopped\n")


@pytest.mark.parametrize(
    "names",
    [
        "SIGTERM SIGTERM",
        "SIGINT SIGTERM",
        "SIGTERM SIGINT",
        "SIGUSR1 SIGTERM SIGTERM",
        "SIGUSR2 SIGINT SIGTERM",
        "SIGTERM SIGUSR1 SIGTERM",
    ],
)
def test_the_second_stop_signal_ends_at_once(names: str, repository: Path) -> None:
    first, *_, last = (signal.Signals[name] for name in names.split())
    assert told(SENDS_ITSELF, repository, *names.split()) == (128 + last, f"asked {first:d}\n")


@pytest.mark.parametrize(
    "names",
    [
        "SIGUSR1 SIGTERM",
        "SIGUSR2 SIGINT",
        "SIGTERM SIGUSR1",
        "SIGUSR1 SIGUSR1 SIGUSR2 SIGUSR1",
        "SIGUSR1 SIGUSR2 SIGTERM SIGUSR1",
        "SIGHUP SIGHUP",
        "SIGHUP SIGTERM",
    ],
)
def test_an_early_warning_or_a_lost_terminal_asks_for_the_end_once_and_forces_nothing(
    names: str, repository: Path
) -> None:
    first = signal.Signals[names.split()[0]]
    assert told(SENDS_ITSELF, repository, *names.split()) == (0, f"asked {first:d}\nalive\n")


EARLY = """
import os, signal, sys, threading
sys.argv = ["keepwarm", sys.argv[1]]
import services.cli.main
from services.node.signals import on_stop_signal

for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    os.kill(os.getpid(), number)
asked = threading.Event()

def stop(number):
    print("asked", flush=True)
    asked.set()

on_stop_signal(stop)
asked.wait()
print("alive", flush=True)
"""


@pytest.mark.parametrize("verb", ["worker", "keeper", "collect"])
def test_an_early_warning_that_comes_before_there_is_a_handler_is_heard_once_there_is(
    verb: str, repository: Path
) -> None:
    assert told(EARLY, repository, verb) == (0, "asked\nalive\n")
