"""A prompt from a YAML file."""

from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError

from services.contracts import PromptSpec
from services.contracts.errors import InputError
from services.contracts.wire import first_fault

_MAX_BYTES = 1024 * 1024


def read_prompt(path: Path, note: Callable[[str], None] = lambda _: None) -> PromptSpec:
    """The prompt in the file. `note` is called with a message for each fault that was corrected.

    Raises InputError that names the file, the field and the next step.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is over {_MAX_BYTES:,} bytes; a prompt file is small")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt file {path} is not UTF-8; save it as UTF-8") from error
    except (
        # PyYAML's own constructors raise the last four: `!!bool x`, `!!int ''`, …
        *(yaml.YAMLError, ValueError),
        *(RecursionError, AttributeError, LookupError, ArithmeticError),
    ) as error:
        raise InputError(f"the prompt file {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the prompt file {path} must be a mapping, as in samples/prompt.yaml")
    try:
        prompt = PromptSpec.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"the prompt file {path}: {first_fault(error)}; see samples/prompt.yaml and "
            "docs/prompts.md"
        ) from error
    template = prompt.template.rstrip()
    if template == prompt.template:
        return prompt
    # In almost every model a token includes the space before its word, so hardly any word can
    # follow a prompt that ends in a space. It is corrected here and not by the worker, so that the
    # prompt_id belongs to the prompt that is used.
    ending = prompt.template[len(template) :]
    note(
        f"the prompt file {path}: the template ends in white space ({ending!r}), after which a "
        "model hardly ever answers with a label word; it was removed. In YAML write "
        "`template: |-`, as in samples/prompt.yaml: `|` adds a line end"
    )
    return prompt.model_copy(update={"template": template})
