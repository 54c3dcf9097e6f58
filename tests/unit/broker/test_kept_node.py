"""The node that a keeper keeps; the integration tests have a real one."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from services.broker.kept_node import KeptNode
from services.contracts.errors import BrokerError


def test_a_node_that_does_not_start_is_not_waited_for_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, ended = threading.Event(), threading.Event()

    class Node:
        alive = False

        def start(self, stopped: Callable[[], bool] = lambda: False) -> None:
            starting.set()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                if stopped():
                    ended.set()
                    raise BrokerError("stopped")
                time.sleep(0.01)

        def kill(self) -> None:
            pass

    monkeypatch.setattr("services.broker.kept_node.PrivateNode", lambda *_: Node())
    kept = KeptNode(tmp_path / "node", tmp_path / "rabbitmq.log", idle_seconds=60)

    def borrow() -> None:
        with suppress(BrokerError):
            kept.acquire()

    thread = threading.Thread(target=borrow)
    thread.start()
    assert starting.wait(10)
    kept.close()
    thread.join()
    assert ended.is_set() and not kept.exists
