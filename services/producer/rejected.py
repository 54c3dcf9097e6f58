"""`rejected.jsonl`: created only when a record is rejected."""

from pathlib import Path
from types import TracebackType
from typing import IO, Self

from services.contracts.errors import StoreError
from services.producer.parse import Rejection


class RejectedFile:
    """Writes rejections, one JSON object per line. An existing file is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as unwritten:
            if error is None:
                raise self._unwritable(unwritten) from unwritten

    def write(self, rejection: Rejection) -> None:
        """Raises StoreError when the file cannot be written: no line is rejected silently."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("w", encoding="utf-8")
            self._file.write(rejection.model_dump_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self.path} cannot be written: {error.strerror}; free some space, or "
            "name another path"
        )
