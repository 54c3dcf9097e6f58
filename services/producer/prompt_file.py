"""A prompt from a YAML file."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from services.contracts import PromptSpec
from services.contracts.errors import InputError
from services.contracts.wire import first_fault

_MAX_BYTES = 1024 * 1024


def read_prompt(path: Path) -> PromptSpec:
    """Raises InputError that names the file, the field and the next step."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is over {_MAX_BYTES:,} bytes; a prompt file is small")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt file {path} is not UTF-8; save it as UTF-8") from error
    except (
        # The last four are what PyYAML's own constructors stumble with: `!!bool x`, `!!int ''`, …
        *(yaml.YAMLError, ValueError),
        *(RecursionError, AttributeError, LookupError, ArithmeticError),
    ) as error:
        raise InputError(f"the prompt file {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the prompt file {path} must be a mapping, as in samples/prompt.yaml")
    try:
        return PromptSpec.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"the prompt file {path}: {first_fault(error)}; see samples/prompt.yaml and "
            "docs/prompts.md"
        ) from error
