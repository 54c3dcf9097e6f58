"""`keepwarm submit`."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer

from services.broker import BrokerAddress, Declares, Publisher
from services.broker.policies import check_policies
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
from services.cli.logs import configure_logs
from services.cli.options import (
    BrokerOption,
    StoreOption,
)
from services.cli.prepare_submission import (
    finished_in,
    inspect_claims,
    prepared_submission,
    refuse_changed_file,
    remove_foreign,
    update_gold,
)
from services.cli.printable import printable
from services.cli.process import expect_many_small_objects
from services.cli.screen import Screen, line_progress, say
from services.contexts.accepted_contexts import refusal
from services.contracts import load_settings, topology
from services.producer import Progress
from services.telemetry import MetricsServer

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Health:
    """The `metrics_server.Service` of a submission. It is live while it waits for the broker."""

    publisher: Publisher
    liveness_error: str | None = None

    @property
    def readiness_error(self) -> str | None:
        return self.publisher.readiness_error


def submit(
    file: FileArgument,
    model: ModelOption = None,
    prompt: PromptOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    batch_size: BatchSizeOption = None,
    broker: BrokerOption = None,
    store: StoreOption = None,
    format: FormatOption = None,
    column: ColumnOption = None,
    label_map: LabelMapOption = None,
    each_evidence: EachEvidenceOption = False,
    corpus: CorpusOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    rejected: Annotated[
        Path | None,
        typer.Option(
            help="The file for rejected lines. Default: rejected-RUN.jsonl.",
            show_default=False,
        ),
    ] = None,
    revision: RevisionOption = None,
    dtype: DTypeOption = "bfloat16",
    max_model_tokens: MaxTokensOption = 1024,
    engine_argument: EngineArgumentOption = None,
    adapter: AdapterOption = None,
    adapter_revision: AdapterRevisionOption = None,
) -> None:
    """Publish a file of claims for workers, and print the run's id.

    The same file with the same prompt and model is the same run: submitting it again completes the
    run, and no claim counts twice. If a store is set, claims with an outcome are not sent again.
    """
    expect_many_small_objects()
    settings = load_settings(broker_url=broker, store_url=store, batch_size=batch_size)
    configure_logs(settings)
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
    with (
        prepared_submission(
            console, file, context=context, prompt=prompt_spec, options=options
        ) as submission,
        ExitStack() as resources,
    ):
        run_id = submission.run.run_id
        claims_queue = topology.claims_queue(submission.run.context.context_id)
        rejected_path = rejected or Path(f"rejected-{run_id}.jsonl")
        inspect_claims(console, submission, rejected_path)
        finished = finished_in(None, run_id)
        if settings.store_url is not None:
            from services.store import Store  # an extra, needed only with a store

            database = resources.enter_context(Store.open(settings))
            refuse_changed_file(submission, database)
            remove_foreign(submission, database, console)
            update_gold(submission, database)
            finished = finished_in(database, run_id)
        with (
            Publisher(
                BrokerAddress.from_settings(settings),
                "producer",
                window=settings.publish_window,
                declares=Declares("if-missing", (submission.run.context.context_id,)),
            ).open(settings.broker_connect_timeout_seconds) as publisher,
            MetricsServer(settings) as metrics,
            line_progress(console, "publishing", submission.file.records_to_read) as publishing,
        ):
            metrics.serve(_Health(publisher))
            policies = check_policies(settings, [claims_queue])
            for harm in policies.problems:
                say(console, f"Warning: {harm}")
            if policies.unknown:
                log.info("broker.policies_unknown", reason=policies.unknown)
            reason = refusal(submission.run.context, settings)
            if reason is not None:
                say(
                    console,
                    "Warning: only workers started with this --model serve this run, because "
                    f"{reason}",
                )
            sent = 0

            def show(progress: Progress) -> None:
                nonlocal sent
                sent = progress.published
                publishing(progress.records)

            totals = submission.publish(
                publisher,
                batch_size=settings.batch_size,
                order_by_evidence=settings.order_by_evidence,
                finished=finished,
                on_progress=show,
            )
    say(
        console,
        f"{sent:,} of {totals.claims:,} claims are sent to the broker, for workers of "
        f"{submission.run.context.context_id}",
    )
    print(printable(run_id))
