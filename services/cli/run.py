"""`keepwarm run`: a node, a producer, workers and a collector for one file, and all of it gone."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import typer

from services.cli.changed import refuse_changed_file
from services.cli.claims_options import (
    BatchSizeOption,
    ClaimsOptions,
    ColumnOption,
    CorpusOption,
    EachEvidenceOption,
    EncodingOption,
    FileArgument,
    FormatOption,
    LabelMapOption,
    LimitOption,
    PromptOption,
    SeedOption,
    SplitOption,
    prompt_from_flag,
)
from services.cli.context_options import (
    AdapterOption,
    AdapterRevisionOption,
    DTypeOption,
    EngineArgumentOption,
    MaxTokensOption,
    ModelOption,
    RevisionOption,
    context_from_flags,
)
from services.cli.desk import Desk
from services.cli.finished import remove_foreign, update_gold
from services.cli.found_stores import STORE_FILE
from services.cli.garbage import expect_many_small_objects
from services.cli.label_mass import AllowLowMassOption, MassWatch
from services.cli.local_disk import working_dir
from services.cli.logs import configure_logs
from services.cli.options import (
    BrokerOption,
    StoreOption,
)
from services.cli.output_dir import held_output_dir
from services.cli.prepare import inspect_claims, prepared_submission
from services.cli.repeat import FromOption, OnlyOption, claims_to_repeat
from services.cli.screen import Screen, say
from services.contracts import load_settings
from services.contracts.errors import StoreError
from services.doctor.network_store import network_store_warning
from services.store import Store


def run(
    file: FileArgument,
    model: ModelOption = None,
    prompt: PromptOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    batch_size: BatchSizeOption = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Workers, each with a GPU or a share of the cores.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Where results go; results/FILE-RUN otherwise.", show_default=False),
    ] = None,
    broker: BrokerOption = None,
    store: StoreOption = None,
    format: FormatOption = None,
    column: ColumnOption = None,
    label_map: LabelMapOption = None,
    each_evidence: EachEvidenceOption = False,
    corpus: CorpusOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    revision: RevisionOption = None,
    dtype: DTypeOption = "bfloat16",
    max_model_tokens: MaxTokensOption = 1024,
    engine_argument: EngineArgumentOption = None,
    adapter: AdapterOption = None,
    adapter_revision: AdapterRevisionOption = None,
    allow_low_mass: AllowLowMassOption = False,
    only: OnlyOption = None,
    from_run: FromOption = None,
) -> None:
    """Verify a file of claims on this machine, from nothing to a report.

    Without --broker a private RabbitMQ node is started, on loopback and with a password of its
    own, and taken down again. Results are OUT/verdicts.jsonl (a row a claim, input order),
    OUT/report.json and OUT/rejected.jsonl. If a run is interrupted, rerun the same command to
    resume it.
    """
    expect_many_small_objects()
    settings = load_settings(broker_url=broker, store_url=store, batch_size=batch_size)
    console = Screen(stderr=True)
    prompt_spec = prompt_from_flag(prompt)
    options = ClaimsOptions.from_flags(
        prompt_spec,
        format=format,
        column=column,
        label_map=label_map,
        each_evidence=each_evidence,
        corpus=corpus,
        encoding=encoding,
        split=split,
        limit=limit,
        seed=seed,
        only=claims_to_repeat(settings, only, from_run),
    )
    context = partial(
        context_from_flags,
        settings,
        model,
        revision,
        dtype,
        max_model_tokens,
        engine_argument,
        adapter,
        adapter_revision,
    )
    with ExitStack() as held:
        submission = held.enter_context(
            prepared_submission(console, file, context=context, prompt=prompt_spec, options=options)
        )
        stem = "stdin" if file == "-" else Path(file).stem
        directory = out or Path("results") / f"{stem}-{submission.run.run_id.removeprefix('run-')}"
        held.enter_context(held_output_dir(directory))
        place = held.enter_context(working_dir(directory, console))
        if settings.store_url is not None and (harm := network_store_warning(settings)):
            say(console, f"Warning: {harm}")
        settings = settings.model_copy(
            update={"store_url": settings.store_url or str(place / STORE_FILE)}
        )
        configure_logs(settings, held.enter_context(_log_file(directory)))
        database = Store.open(settings)
        held.callback(database.close)
        refuse_changed_file(submission, database)
        inspect_claims(console, submission, directory / "rejected.jsonl")
        remove_foreign(submission, database, console)
        update_gold(submission, database)
        watch = MassWatch(console, allowed=allow_low_mass)
        desk = Desk(submission, settings, database, directory, place, console, workers, watch)
        stopped_by = desk.work()
        desk.write_results()
    if stopped_by is not None:
        console.print("Stopped. The same command goes on where this one ended.")
        sys.exit(128 + stopped_by)
    watch.raise_if_low()


@contextmanager
def _log_file(directory: Path) -> Iterator[TextIO]:
    path = directory / "logs" / "run.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield file
    finally:
        with suppress(OSError):  # a full disk: the results say so, the log need not
            file.close()
