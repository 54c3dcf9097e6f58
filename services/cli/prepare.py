"""From flags to a submission: what `run` and `submit` do alike before anything is sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from services.cli.claims_options import check_seed, columns_from_flags
from services.cli.screen import line_progress, say_ignored_columns
from services.contracts import ContextSpec, PromptSpec
from services.gpu_worker import CompiledPrompt, ModelTokenizer
from services.producer import Format, Source, Submission


@contextmanager
def prepared_submission(
    console: Console,
    file: str,
    format: Format | None,
    *,
    context: Callable[[], ContextSpec],
    prompt: PromptSpec,
    column: list[str] | None,
    limit: int | None,
    seed: int | None,
) -> Iterator[Submission]:
    """The file, open and surveyed, as a run of this prompt on this context.

    Raises InputError for the file, ModelError when the prompt's label words cannot be told apart
    under the model's tokenizer: known now, not after a model is loaded.
    """
    check_seed(limit, seed)
    columns = columns_from_flags(column)
    with Source.open(file, format) as source:
        # Asked only now: a name on the hub takes time, a missing file is known at once.
        pinned = context()
        CompiledPrompt(prompt, ModelTokenizer.load(pinned))
        with line_progress(console, "reading", None) as reading:
            survey = source.survey(reading)
        submission = Submission(
            source,
            survey,
            context=pinned,
            prompt=prompt,
            columns=columns,
            limit=limit,
            seed=seed,
        )
        say_ignored_columns(console, submission)
        yield submission
