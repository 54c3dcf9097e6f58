"""The cells of a sweep: a run for each prompt with each model."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.cli.claims_options import ClaimsOptions, prompt_from_flag
from services.cli.context_options import context_from_flags
from services.cli.prepare_submission import prepared_submissions
from services.cli.screen import Screen
from services.cli.sweep_file import SweepFile, keys_for_flags, require_names
from services.contracts import ContextSpec, Settings
from services.producer import Submission

_MAX_DIRECTORY_CHARS = 100


@dataclass(frozen=True)
class Cell:
    """One prompt with one model: a run. `prompt` and `model` are their names in tables."""

    prompt: str
    model: str
    name: str
    """Of these, what tells the cells of the sweep apart."""
    submission: Submission

    @property
    def run_id(self) -> str:
        return self.submission.run.run_id

    @property
    def directory(self) -> str:
        """The name of the directory of its results."""
        words = "-".join(re.findall(r"[A-Za-z0-9._]+", f"{self.prompt} {self.model}"))
        return f"{words[:_MAX_DIRECTORY_CHARS].lstrip('.')}-{self.run_id.removeprefix('run-')}"


@contextmanager
def prepared_cells(
    console: Screen, settings: Settings, path: Path, sweep: SweepFile
) -> Iterator[list[Cell]]:
    """The cells of the sweep file at `path`, by model.

    Raises InputError that names the file and the key, and ModelError for a model that cannot be
    used or does not fit a prompt.
    """
    prompts = [prompt_from_flag(prompt) for prompt in sweep.prompts]
    prompt_names = [prompt.name for prompt in prompts]
    require_names(path, "prompts", prompt_names, prompts)
    claims = sweep.claims
    with keys_for_flags(path, "claims"):
        options, *_ = [
            ClaimsOptions.from_flags(
                prompt,
                format=claims.format,
                column=[f"{field}={column}" for field, column in claims.columns.items()],
                label_map=[f"{label}={name}" for label, name in claims.label_map.items()],
                each_evidence=claims.each_evidence,
                corpus=claims.corpus,
                encoding=claims.encoding,
                split=claims.split,
                limit=claims.limit,
                seed=claims.seed,
            )
            for prompt in prompts
        ]
    names: dict[str, str] = {}

    def contexts() -> list[ContextSpec]:
        with keys_for_flags(path, "models"):
            pinned = [
                context_from_flags(
                    settings,
                    entry.model,
                    entry.revision,
                    entry.dtype,
                    entry.max_model_tokens,
                    [*entry.engine_arguments],
                    entry.adapter,
                    entry.adapter_revision,
                )
                for entry in sweep.models
            ]
        found = [
            entry.name_of(context) for entry, context in zip(sweep.models, pinned, strict=True)
        ]
        require_names(path, "models", found, pinned)
        names.update(zip((context.context_id for context in pinned), found, strict=True))
        return pinned

    with ExitStack() as opened:
        with keys_for_flags(path, "claims"):
            submissions = opened.enter_context(
                prepared_submissions(
                    console, str(claims.file), contexts=contexts, prompts=prompts, options=options
                )
            )
        yield [_cell(each, names) for each in submissions]


def _cell(submission: Submission, names: dict[str, str]) -> Cell:
    prompt = submission.run.prompt.name
    model = names[submission.run.context.context_id]
    return Cell(prompt, model, prompt if len(names) == 1 else f"{prompt}, {model}", submission)
