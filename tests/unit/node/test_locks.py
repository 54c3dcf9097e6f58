import errno
import fcntl
import os
from pathlib import Path

import pytest

from services.cli.output_dir import locked_output_dir
from services.contexts.caches import EngineCaches
from services.contracts.errors import UsageError
from services.node.runtime_dir import lock_file, take_lock


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre that is mounted without `-o flock`."""

    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_lock_is_had_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    one, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock_file(one, path, "--out")
    assert not lock_file(other, path, "--out")
    os.close(one)
    assert lock_file(other, path, "--out")
    os.close(other)


@pytest.mark.usefixtures("_no_locks")
def test_a_file_system_without_locks_is_named_with_the_setting_that_chose_it(
    tmp_path: Path,
) -> None:
    says = "the file system of .* has no file locks .*; name a directory on a local disk"
    with pytest.raises(UsageError, match=f"--out: {says}"), locked_output_dir(tmp_path):
        pass
    with pytest.raises(UsageError, match=f"KEEPWARM_RUNTIME_DIR: {says}"):
        take_lock(tmp_path / "keeper.lock")
    caches = EngineCaches(tmp_path)
    with pytest.raises(UsageError, match=f"KEEPWARM_CACHE_DIR: {says}"), caches.starting("e"):
        pass
