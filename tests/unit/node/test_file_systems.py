from collections.abc import Callable
from pathlib import Path

from services.node.file_systems import network_file_system


def test_the_innermost_mount_counts(mounted: Callable[[Path, str], None], tmp_path: Path) -> None:
    mounted(tmp_path, "lustre")
    assert network_file_system(tmp_path / "a" / "b") == "lustre"
    assert network_file_system(tmp_path.parent) is None
