"""A mapping from a YAML file that a person wrote."""

from pathlib import Path
from typing import Any

import yaml

from services.contracts.errors import InputError

_MAX_BYTES = 1024 * 1024


def read_mapping(path: Path, kind: str, sample: str) -> dict[Any, Any]:
    """The mapping in the file. `kind` and `sample`, for error messages, are what the file is and a
    file to start from.

    Raises InputError that names the file and the next step.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is over {_MAX_BYTES:,} bytes; a {kind} is small")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the {kind} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the {kind} {path} is not UTF-8; save it as UTF-8") from error
    except (
        # PyYAML's own constructors raise the last four: `!!bool x`, `!!int ''`, …
        *(yaml.YAMLError, ValueError),
        *(RecursionError, AttributeError, LookupError, ArithmeticError),
    ) as error:
        raise InputError(f"the {kind} {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the {kind} {path} must be a mapping, as in {sample}")
    return content
