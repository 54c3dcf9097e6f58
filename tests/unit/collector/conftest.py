"""Stores, and a count of runs that does not depend on the machine's speed."""

import pytest

from tests.unit.stores import make, open_store, other_run, prompt, run, store

__all__ = ["make", "open_store", "other_run", "prompt", "run", "store"]


@pytest.fixture(autouse=True)
def _time_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory counts all runs at one look, however slow this machine is."""
    monkeypatch.setattr("services.collector.demand._COUNTING_SECONDS", 60.0)
