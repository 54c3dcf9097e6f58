"""From flags to a submission: what `run` and `submit` do before anything is sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.cli.claims_options import ClaimsOptions
from services.cli.input_summary import summary_lines
from services.cli.screen import Screen, line_progress, say
from services.contracts import ContextSpec, PromptSpec
from services.contracts.runs import InputSummary
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import ClaimsFile, RejectedFile, Source, Submission


def open_source(console: Screen, file: str, options: ClaimsOptions) -> Source:
    """Raises InputError that names the file and the next step.

    A large CSV file is read several times to find its dialect.
    """
    with console.status("opening the file"):
        return Source.open(
            file,
            options.container,
            claim_column=options.selection.columns.get("claim"),
            encoding=options.encoding,
            split=options.split,
        )


def read_claims(
    console: Screen, source: Source, prompt: PromptSpec, options: ClaimsOptions
) -> ClaimsFile:
    """Recognise the format and read the file once, with progress on the screen.

    Raises InputError for the file.
    """
    with line_progress(console, "reading", None) as reading:
        return ClaimsFile(source, prompt, options.selection, on_records=reading, on_pages=reading)


@contextmanager
def prepared_submission(
    console: Screen,
    file: str,
    *,
    context: Callable[[], ContextSpec],
    prompt: PromptSpec,
    options: ClaimsOptions,
) -> Iterator[Submission]:
    """The file as a run of this prompt on this context.

    Raises InputError for the file, and ModelError when the model's tokenizer cannot distinguish the
    prompt's label words: before a model is loaded.
    """
    with open_source(console, file, options) as source:
        # After the file is open: a missing file is reported at once, a hub lookup takes time.
        pinned = context()
        CompiledPrompt(prompt, ModelTokenizer.load(pinned))
        claims = read_claims(console, source, prompt, options)
        yield Submission(claims, pinned)


def inspect_claims(console: Screen, submission: Submission, rejected: Path) -> InputSummary:
    """Print and return a summary of the file, and write its rejected lines to `rejected`.

    Raises InputError when no line is a claim.
    """
    with (
        RejectedFile(rejected) as rejections,
        line_progress(console, "checking", submission.file.records_to_read) as checking,
    ):
        summary = submission.inspect(rejections, checking)
    for line in summary_lines(submission.file, summary):
        say(console, line)
    if summary.rejected:
        say(console, f"Rejected lines: {rejected}")
    return summary
