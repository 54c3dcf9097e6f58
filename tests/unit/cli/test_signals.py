import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.signals import on_stop_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    asked: list[int] = []
    on_stop_signal(asked.append)
    os.kill(os.getpid(), number)
    assert asked == [number]


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")]
)
def test_the_second_signal_ends_at_once(first: str, second: str, repository: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from services.cli.signals import on_stop_signal\n"
        "on_stop_signal(lambda number: print('asked', number, flush=True))\n"
        f"os.kill(os.getpid(), signal.{first})\n"
        f"os.kill(os.getpid(), signal.{second})\n"
        "time.sleep(600)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 128 + signal.Signals[second]
    assert done.stdout == f"asked {signal.Signals[first]:d}\n"
