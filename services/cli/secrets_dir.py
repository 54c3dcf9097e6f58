"""The directory of the roles' passwords: one private file for each role."""

import os
import secrets
from pathlib import Path

from services.contracts.errors import StoreError, UsageError

_OTHERS = 0o077


class SecretsDir:
    """Created with mode 0700. Raises UsageError when others may read an existing directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = directory.stat().st_mode
        except OSError as error:
            raise self._unusable(error) from error
        if mode & _OTHERS:
            raise UsageError(
                f"--secrets: other users may read {directory}; name another directory, or run "
                f"`chmod 700 {directory}`"
            )

    def file(self, role: str) -> Path:
        return self._directory / f"{role}.password"

    def read(self, role: str) -> str | None:
        """The role's password without its line end; None when there is none yet."""
        file = self.file(role)
        try:
            mode = file.stat().st_mode
            password = file.read_text(encoding="utf-8").rstrip("\r\n")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._unusable(error) from error
        if mode & _OTHERS:
            raise UsageError(
                f"other users may read {file}: run `chmod 600 {file}` if nobody did, otherwise "
                "create new passwords with --renew"
            )
        if not password:
            raise UsageError(f"{file} is empty: delete it, or write the role's password to it")
        return password

    def write_new(self, role: str) -> str:
        """A new random password. It replaces the file atomically: a full disk keeps the old one."""
        password = secrets.token_urlsafe(32)
        new = self._directory / f".{role}.new"
        try:
            new.unlink(missing_ok=True)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{password}\n")
            new.replace(self.file(role))
        except OSError as error:
            raise self._unusable(error) from error
        return password

    def _unusable(self, error: Exception) -> StoreError:
        return StoreError(
            f"the directory of passwords, {self._directory}, cannot be used: {error}; name "
            "another with --secrets"
        )
