"""`keepwarm run`: verifies one file of claims with all services on this machine."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import typer

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
from services.cli.label_mass import AllowLowMassOption, MassWatch
from services.cli.live_view import RunView
from services.cli.logs import configure_logs
from services.cli.options import (
    BrokerOption,
    StoreOption,
)
from services.cli.output_dir import locked_output_dir, working_dir
from services.cli.prepare_submission import (
    finished_in,
    inspect_claims,
    prepared_submission,
    refuse_changed_file,
    remove_foreign,
    update_gold,
)
from services.cli.process import expect_many_small_objects
from services.cli.screen import Screen, print_report, say
from services.cli.stores import RESULTS, STORE_FILE, network_store_warning, store_of_run
from services.contracts import Settings, load_settings
from services.contracts.errors import InputError, StoreError, UsageError
from services.local.local_run import LocalRun
from services.store import Report, Store, build_report, export_run, find_run, unanswered_claims

_KINDS = ("invalid", "dead")

WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers", min=1, max=64, help="Workers, each with a GPU or a share of the cores."
    ),
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        "--only",
        help="With --from: only claims of that run whose verdict is INVALID (invalid), that are "
        "dead (dead), or both (invalid,dead). Use another prompt or model for them.",
        show_default=False,
    ),
]
FromOption = Annotated[
    str | None,
    typer.Option("--from", help="The run that --only refers to.", show_default=False),
]


def run(
    file: FileArgument,
    model: ModelOption = None,
    prompt: PromptOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = 1,
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

    Without --broker it uses a private RabbitMQ node, on loopback and with its own password.
    Results are OUT/verdicts.jsonl (one row for each claim, in input order), OUT/report.json and
    OUT/rejected.jsonl. If a run is interrupted, rerun the same command to
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
    with ExitStack() as resources:
        submission = resources.enter_context(
            prepared_submission(console, file, context=context, prompt=prompt_spec, options=options)
        )
        run_id = submission.run.run_id
        stem = "stdin" if file == "-" else Path(file).stem
        output_dir = out or RESULTS / f"{stem}-{run_id.removeprefix('run-')}"
        settings, data_dir, database = resources.enter_context(
            opened_results(output_dir, settings, console)
        )
        refuse_changed_file(submission, database)
        summary = inspect_claims(console, submission, output_dir / "rejected.jsonl")
        remove_foreign(submission, database, console)
        update_gold(submission, database)
        mass = MassWatch(console, allowed=allow_low_mass)
        local_run = LocalRun(
            [submission],
            settings,
            database,
            RunView(console, summary.claims, {run_id: mass}),
            partial(finished_in, database),
            output_dir=output_dir,
            data_dir=data_dir,
            workers=workers,
        )
        stopped_by = local_run.run()
        for error in local_run.failures.values():
            raise error
        write_results(console, database, run_id, output_dir)
    if stopped_by is not None:
        console.print("Stopped. Rerun the same command to resume the run.")
        sys.exit(128 + stopped_by)
    mass.raise_if_low()


@contextmanager
def opened_results(
    output_dir: Path, settings: Settings, console: Screen
) -> Iterator[tuple[Settings, Path, Store]]:
    """Lock the directory of the results, log to it, and open the store, which is in it unless the
    settings name one. Yields the settings with the store's URL, a directory on a local disk for
    data, and the store.

    Raises StoreError when the directory or the store cannot be used.
    """
    with ExitStack() as resources:
        resources.enter_context(locked_output_dir(output_dir))
        data_dir = resources.enter_context(working_dir(output_dir, console))
        if settings.store_url is not None and (harm := network_store_warning(settings)):
            say(console, f"Warning: {harm}")
        settings = settings.model_copy(
            update={"store_url": settings.store_url or str(data_dir / STORE_FILE)}
        )
        configure_logs(settings, resources.enter_context(_log_file(output_dir)))
        yield settings, data_dir, resources.enter_context(Store.open(settings))


def claims_to_repeat(
    settings: Settings, only: str | None, from_run: str | None
) -> frozenset[str] | None:
    """The ids of the selected claims; None for all claims.

    Raises UsageError for an invalid combination of flags, StoreError when there is no such run,
    InputError when no claim matches.
    """
    if only is None and from_run is None:
        return None
    if from_run is None or only is None:
        raise UsageError("--only and --from go together: --only invalid,dead --from RUN")
    kinds = [kind.strip() for kind in only.split(",")]
    if unknown := set(kinds) - set(_KINDS):
        raise UsageError(f"--only takes {' and '.join(_KINDS)}, not {', '.join(sorted(unknown))!r}")
    with store_of_run(settings, from_run) as (store, known):
        found = unanswered_claims(store, known, kinds)
    if not found:
        raise InputError(
            f"{known.run_id} has no {' or '.join(kinds)} claims, so there is nothing to repeat"
        )
    return found


def write_results(console: Screen, store: Store, run_id: str, output_dir: Path) -> None:
    """Write the run's files, and print the report.

    Raises StoreError when a file cannot be written.
    """
    report = write_files(store, run_id, output_dir)
    if report is not None:
        print_report(Screen(), report)
        say(console, f"Results are in {output_dir}/")


def write_files(store: Store, run_id: str, output_dir: Path) -> Report | None:
    """Write `verdicts.jsonl` and `report.json`. Returns the report; None if the run was stopped
    before it was announced.

    Raises StoreError when a file cannot be written.
    """
    try:
        known = find_run(store, run_id)
    except StoreError:
        return None
    report = build_report(store, known)
    export_run(store, known, "jsonl", output_dir / "verdicts.jsonl")
    write_text(output_dir / "report.json", report.model_dump_json(indent=2) + "\n")
    return report


def write_text(path: Path, text: str) -> None:
    """Raises StoreError when the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}; free some space and rerun the command"
        ) from error


@contextmanager
def _log_file(directory: Path) -> Iterator[TextIO]:
    path = directory / "logs" / "run.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}; choose another --out"
        ) from error
    try:
        yield file
    finally:
        with suppress(OSError):  # a full disk: writing the results reports it
            file.close()
