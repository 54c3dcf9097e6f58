"""What makes the next cold start cheaper: compile caches on this node, and how starts went.

Each engine has a directory of its own under `KEEPWARM_CACHE_DIR`, so that no two write to one: it
is locked while its engine starts, and one that was left half-written, by a start that was killed,
is thrown away at the next.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from services.contexts.runtime_dir import open_private_dir
from services.contracts.startup import StartupPhases
from services.contracts.values import Value

_UNFINISHED = "unfinished"
_STARTUP = "startup.json"


class PastStart(Value):
    """What is known of an engine from its last start here."""

    phases: StartupPhases
    memory_bytes: int

    @property
    def seconds_again(self) -> float:
        """What it takes to bring it back where a template is: that has the imports done, and the
        weights are on the node by now. The two went on at the same time.
        """
        phases = self.phases
        return max(0.0, (phases.total or 0.0) - max(phases.imports or 0.0, phases.fetch or 0.0))


class EngineCaches:
    """The directory of all of them. Safe for several keepers of one user."""

    def __init__(self, directory: Path) -> None:
        """Raises UsageError when it cannot be made, or is another user's."""
        self._directory = open_private_dir(directory, "KEEPWARM_CACHE_DIR")

    @contextmanager
    def starting(self, name: str) -> Iterator[Path]:
        """The engine's own directory, for as long as the start lasts; waits for whoever has it."""
        directory = self._directory / name
        # It may have been deleted since: that is how a person makes room.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            marker = directory / _UNFINISHED
            if marker.exists():
                shutil.rmtree(directory)
            directory.mkdir(mode=0o700, exist_ok=True)
            marker.touch()
            yield directory
            # Not in a `finally`: a start that failed leaves its marker.
            marker.unlink()
        finally:
            os.close(lock)

    def remember(self, name: str, start: PastStart) -> None:
        path = self._directory / name / _STARTUP
        new = path.with_suffix(".new")
        new.write_text(start.model_dump_json(), encoding="utf-8")
        new.replace(path)

    def recall_all(self) -> Iterator[PastStart]:
        """Of each engine that was ever started here."""
        for path in self._directory.glob(f"*/{_STARTUP}"):
            past = self.recall(path.parent.name)
            if past is not None:
                yield past

    def recall(self, name: str) -> PastStart | None:
        try:
            return PastStart.model_validate_json((self._directory / name / _STARTUP).read_bytes())
        except (OSError, ValidationError):
            return None
