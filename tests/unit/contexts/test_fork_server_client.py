"""A supervised engine, as its keeper sees it."""

import socket
import subprocess
import sys

import pytest

from services.contexts import fork_server_client
from services.contexts.fork_server_client import EngineProcess


def test_an_engine_whose_supervisor_reports_nothing_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fork_server_client, "_SUPERVISOR_SECONDS", 0.1)
    ours, supervisor = socket.socketpair()
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    with supervisor, subprocess.Popen(sleeping, start_new_session=True) as engine:
        supervisor.sendall(b'{"pid": %d, "imported_at": 0.0}\n' % engine.pid)
        process = EngineProcess(ours, grace_seconds=0.0)
        assert process.exit_code() is None
        process.stop()
        assert engine.wait(30) == -9
        # A start that failed stops it, and its slot stops it again.
        process.stop()
        assert process.exit_code() == -9
        assert ours.fileno() == -1
