from collections.abc import Callable
from pathlib import Path

from services.doctor.findings import shared_file_system


def test_the_innermost_mount_counts(mounted: Callable[[Path, str], None], tmp_path: Path) -> None:
    mounted(tmp_path, "lustre")
    assert shared_file_system(tmp_path / "a" / "b") == "lustre"
    assert shared_file_system(tmp_path.parent) is None
