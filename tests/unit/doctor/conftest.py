from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

Partition = namedtuple("Partition", "mountpoint fstype")


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """`mounted(path, "nfs4")`: a file system of this type is mounted there."""

    def mount(path: Path, kind: str) -> None:
        mounts = [Partition("/", "ext4"), Partition(str(path), kind)]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)

    return mount
