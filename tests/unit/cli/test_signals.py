import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.signals import on_stop_signal

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def _handlers_are_set_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    asked: list[int] = []
    on_stop_signal(asked.append)
    os.kill(os.getpid(), number)
    assert asked == [number]


def sent(names: str, repository: Path) -> tuple[int, str]:
    """Exit code and words of a process that sends itself these signals, and ends with 0 then."""
    code = (
        "import os, signal, sys\n"
        "from services.cli.signals import on_stop_signal\n"
        "on_stop_signal(lambda number: print('asked', number, flush=True))\n"
        "for name in sys.argv[1:]:\n"
        "    os.kill(os.getpid(), signal.Signals[name])\n"
        "print('alive', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names.split()],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


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
    assert sent(names, repository) == (128 + last, f"asked {first:d}\n")


@pytest.mark.parametrize(
    "names",
    [
        "SIGUSR1 SIGTERM",
        "SIGUSR2 SIGINT",
        "SIGTERM SIGUSR1",
        "SIGUSR1 SIGUSR1 SIGUSR2 SIGUSR1",
        "SIGUSR1 SIGUSR2 SIGTERM SIGUSR1",
    ],
)
def test_a_schedulers_early_warning_asks_for_the_end_once_and_forces_nothing(
    names: str, repository: Path
) -> None:
    first = signal.Signals[names.split()[0]]
    assert sent(names, repository) == (0, f"asked {first:d}\nalive\n")
