"""A prompt from a YAML file."""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from services.contracts import PromptSpec
from services.contracts.errors import InputError
from services.contracts.wire import first_fault
from services.producer.yaml_file import read_mapping


def read_prompt(path: Path, note: Callable[[str], None] = lambda _: None) -> PromptSpec:
    """The prompt in the file. `note` is called with a message for each fault that was corrected.

    Raises InputError that names the file, the field and the next step.
    """
    content = read_mapping(path, "prompt file", "samples/prompt.yaml")
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
