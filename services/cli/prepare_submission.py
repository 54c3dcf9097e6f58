"""What `run` and `submit` do before anything is sent: read the file, print its summary, and compare
it with its run in the store.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from services.cli.claims_options import ClaimsOptions
from services.cli.input_summary import summary_lines
from services.cli.screen import Screen, line_progress, say
from services.contracts import Claim, ContextSpec, PromptSpec, Run
from services.contracts.errors import InputError
from services.contracts.runs import InputSummary
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import ClaimsFile, RejectedFile, Source, Submission
from services.producer.submission import Finished

if TYPE_CHECKING:  # not every machine that submits has a store
    from services.store import RunStatus, Store

_SHOWN_IDS = 5
# Of a run. If these are equal and the file's content differs, the file was changed.
_SAME = ("source", "context", "prompt", "limit", "seed")


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
    """The file as a run of this prompt on this context; see `prepared_submissions`."""
    with prepared_submissions(
        console, file, contexts=lambda: [context()], prompts=[prompt], options=options
    ) as (submission,):
        yield submission


@contextmanager
def prepared_submissions(
    console: Screen,
    file: str,
    *,
    contexts: Callable[[], Sequence[ContextSpec]],
    prompts: Sequence[PromptSpec],
    options: ClaimsOptions,
) -> Iterator[list[Submission]]:
    """The file as runs of these prompts on each of these contexts, by context.

    Raises InputError for the file, and ModelError when a model's tokenizer cannot distinguish a
    prompt's label words: before a model is loaded.
    """
    with open_source(console, file, options) as source:
        # After the file is open: a missing file is reported at once, a hub lookup takes time.
        pinned = contexts()
        for context in pinned:
            tokenizer = ModelTokenizer.load(context)
            for prompt in prompts:
                CompiledPrompt(prompt, tokenizer)
        claims = [read_claims(console, source, prompt, options) for prompt in prompts]
        yield [Submission(each, context) for context in pinned for each in claims]


def inspect_claims(
    console: Screen,
    submission: Submission,
    rejected: Path,
    show: Callable[[str], None] | None = None,
) -> InputSummary:
    """Return a summary of the file, `show` its lines (otherwise they are printed), and write the
    file's rejected lines to `rejected`.

    Raises InputError when no line is a claim.
    """
    with (
        RejectedFile(rejected) as rejections,
        line_progress(console, "checking", submission.file.records_to_read) as checking,
    ):
        summary = submission.inspect(rejections, checking)
    show = show or partial(say, console)
    for line in summary_lines(submission.file, summary):
        show(line)
    if summary.rejected:
        show(f"Rejected lines: {rejected}")
    return summary


def refuse_changed_file(submission: Submission, store: "Store") -> None:
    """Raises InputError, with the difference, when the store has an unfinished run of a file of the
    same name, verified in the same way, with other content. The user means to complete that run,
    and would start another.
    """
    from services.store import known_runs, run_status

    for run in (known.run for known in known_runs(store)):
        if run is None or not _changed(run, submission.run):
            continue
        status = run_status(store, run.run_id)
        if status is not None and not status.complete and not status.cancelled:
            flag = submission.file.differing_flag(run.source_digest)
            what = (
                f"is read with another {flag}"
                if flag
                else "has changed, or is read with other flags (--column, --format, "
                "--each-evidence, --corpus),"
            )
            raise InputError(
                f"{run.source} {what} since it was submitted as {run.run_id}, which is "
                f"unfinished: {_difference(submission, status, store)}. To complete that run, "
                "submit the original file with the same flags. To start a new run, first run "
                f"`keepwarm cancel {run.run_id}`"
            )


def _changed(earlier: Run, now: Run) -> bool:
    """Whether only the file's content differs."""
    alike = all(getattr(earlier, name) == getattr(now, name) for name in _SAME)
    return alike and earlier.source_digest != now.source_digest


def _difference(submission: Submission, status: "RunStatus", store: "Store") -> str:
    answered = status.done + status.dead
    same, first = 0, ""
    for claims in submission.claims():
        texts = store.texts(status.run_id, [claim.claim_id for claim in claims])
        changed = [claim for claim in claims if texts.get(claim.claim_id, claim.text) != claim.text]
        same += len(texts) - len(changed)
        first = first or (_named(changed[0]) if changed else "")
    then = ""
    if status.total is not None:
        then = f"{status.total + (status.repeated or 0) + (status.rejected or 0):,} lines then, "
    example = f", first {first}" if first else ""
    return (
        f"{then}{submission.file.records_to_read:,} lines now; of its {answered:,} claims with an "
        f"outcome {answered - same:,} have another text or are missing{example}"
    )


def _named(claim: Claim) -> str:
    return f"{claim.claim_id!r} in line {claim.position + 1}"


def remove_foreign(submission: Submission, store: "Store", console: Screen) -> None:
    """Remove outcomes of claims that are not in the file, when the run has as many outcomes as
    claims but they are not those of its claims.
    """
    from services.store import run_status  # installed, since there is a store

    run_id = submission.run.run_id
    status = run_status(store, run_id)
    if status is None or status.proven is not False:
        return
    ids = store.remove_foreign(run_id, chain.from_iterable(submission.claims()))
    shown = ", ".join(repr(claim_id) for claim_id in ids[:_SHOWN_IDS])
    more = ", …" if len(ids) > _SHOWN_IDS else ""
    say(
        console,
        f"Removed {len(ids):,} outcomes of claims that are not in the file: {shown}{more}",
    )


def update_gold(submission: Submission, store: "Store") -> None:
    """Update the gold labels of claims that have an outcome. The user may name the label column or
    map a label after the claims are computed.
    """
    summary = submission.input
    if summary is None or not (summary.gold or summary.unknown_labels):
        return  # without labels in the file, those in the store stay
    from services.store import run_status  # installed, since there is a store

    run_id = submission.run.run_id
    status = run_status(store, run_id)
    if status is None or not status.done + status.dead:
        return  # no outcome to update: do not read the file again
    store.set_input(run_id, summary)
    for claims in submission.claims():
        store.set_gold(run_id, {claim.claim_id: claim.gold for claim in claims})


def finished_in(store: "Store | None", run_id: str) -> Finished:
    """Selects the claims that need not be sent: those with an outcome in the run."""

    def finished(claims: Sequence[Claim]) -> Collection[str]:
        ids = [claim.claim_id for claim in claims]
        return () if store is None else store.finished(run_id, ids)

    return finished
