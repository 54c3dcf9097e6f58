"""What makes the next cold start cheaper: compile caches on this node, and how starts went.

Each engine has a directory of its own under `KEEPWARM_CACHE_DIR`, so that no two write to one: it
is locked while its engine starts. Not all that is compiled is written at once and whole (vLLM's
index and C++ libraries are not), so what a start wrote that was given up or killed is thrown away
at the next. What earlier starts wrote stays: nodes that are preempted often would never have any.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from pydantic import ValidationError

from services.contexts.runtime_dir import open_private_dir
from services.contracts import locks
from services.contracts.errors import EngineStartError
from services.contracts.startup import StartupPhases
from services.contracts.values import Value

_UNFINISHED = "unfinished"
_STARTUP = "startup.json"

log = structlog.get_logger(__name__)


class PastStart(Value):
    """What is known of an engine from its last start here."""

    phases: StartupPhases
    memory_bytes: int | None = None
    """None where it could not be told."""

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
        """The engine's own directory, for as long as the start lasts; waits for whoever has it.

        A start that fails may have failed with what it found: nothing compiled is left by it.
        """
        directory = self._directory / name
        # It may have been deleted since: that is how a person makes room.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            locks.take(lock, self._directory / f"{name}.lock", "KEEPWARM_CACHE_DIR", wait=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            marker = directory / _UNFINISHED
            if marker.exists():
                _throw_away(directory, since_ns=marker.lstat().st_ctime_ns)
            marker.touch()
            try:
                yield directory
            except EngineStartError:
                _throw_away(directory)
                raise
            # Not in a `finally`: a start that is broken off leaves its marker.
            marker.unlink()
        finally:
            os.close(lock)

    def remember(self, name: str, start: PastStart) -> None:
        """Where the disk has room for it: the engine is well without."""
        path = self._directory / name / _STARTUP
        new = path.with_suffix(".new")
        try:
            new.write_text(start.model_dump_json(), encoding="utf-8")
            new.replace(path)
        except OSError as error:
            log.error("start.not_remembered", path=str(path), reason=str(error))

    def recall_all(self) -> dict[str, PastStart]:
        """Of each engine that was ever started here, by its name."""
        names = [path.parent.name for path in self._directory.glob(f"*/{_STARTUP}")]
        return {name: past for name in names if (past := self.recall(name)) is not None}

    def recall(self, name: str) -> PastStart | None:
        try:
            return PastStart.model_validate_json((self._directory / name / _STARTUP).read_bytes())
        except (OSError, ValidationError):
            return None


def _throw_away(directory: Path, since_ns: int = 0) -> None:
    """What was written since then, but for our own files, which are written whole.

    Goes by when a file last changed, which its writer cannot set, as a copy sets the time of its
    contents.
    """
    ours = {directory / _UNFINISHED, directory / _STARTUP}
    for root, folders, files in os.walk(directory, topdown=False):
        for path in (Path(root, name) for name in files):
            if path not in ours and path.lstat().st_ctime_ns >= since_ns:
                path.unlink()
        for name in folders:
            with contextlib.suppress(OSError):  # it is not empty
                Path(root, name).rmdir()
