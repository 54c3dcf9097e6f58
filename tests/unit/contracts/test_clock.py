"""Time in which a process could run, told by a real process that is really stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from services.contracts.clock import awake_seconds

CHILD = """
import sys, time
from services.contracts import clock
clock._MAX_LATE_SECONDS = 1.5
begun, seen = clock.awake_seconds(), time.monotonic()
print("ready", flush=True)
sys.stdin.readline()
print(clock.awake_seconds() - begun, time.monotonic() - seen, flush=True)
"""
STOPPED_SECONDS = 4.0


def test_the_time_in_which_a_process_is_stopped_does_not_count(repository: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS)
        os.kill(child.pid, signal.SIGCONT)
        child.stdin.write("\n")
        child.stdin.flush()
        running, passed = map(float, child.stdout.readline().split())
    assert passed >= STOPPED_SECONDS
    assert running <= passed - STOPPED_SECONDS + 1.5


def test_it_goes_on_while_the_process_runs() -> None:
    begun, seen = awake_seconds(), time.monotonic()
    time.sleep(0.3)
    assert 0.3 <= awake_seconds() - begun <= time.monotonic() - seen + 0.1
