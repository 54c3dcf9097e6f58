"""What tests of dashboards and alerts share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.monitoring.system import System, whole_system


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[System]:
    """With the tests' engine, and minutes that take a second."""
    with whole_system(tmp_path_factory.mktemp("system"), small_model) as running:
        yield running
