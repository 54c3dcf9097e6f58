"""`keepwarm run`: a node, a producer, workers and a collector for one file, and all of it gone."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer
from pydantic import SecretStr
from rich.console import Console

from services.broker import BrokerAddress, PrivateNode, Publisher
from services.cli.claims_options import (
    BatchSizeOption,
    ColumnOption,
    LimitOption,
    PromptOption,
    SeedOption,
    check_seed,
    columns_from_flags,
    prompt_from_flag,
)
from services.cli.context_options import (
    DTypeOption,
    EngineArgumentOption,
    MaxTokensOption,
    ModelOption,
    RevisionOption,
    context_from_flags,
)
from services.cli.finished import finished_in
from services.cli.garbage import expect_many_small_objects
from services.cli.live_view import LiveView
from services.cli.logs import configure_logs
from services.cli.options import (
    BrokerOption,
    StoreOption,
)
from services.cli.output_dir import held_output_dir
from services.cli.screen import line_progress, print_report, say_ignored_columns
from services.cli.signals import on_stop_signal
from services.cli.worker_processes import WorkerProcess, worker_processes
from services.collector import (
    Collector,
    Store,
    build_report,
    export_run,
    find_run,
    run_status,
)
from services.contracts import Settings, load_settings
from services.contracts.errors import BrokerError, StoreError
from services.gpu_worker import CompiledPrompt, ModelTokenizer, find_device
from services.producer import Format, Progress, RejectedFile, Source, Submission

_LOOK_SECONDS = 0.25


def run(
    file: Annotated[
        str, typer.Argument(help="JSONL or CSV, one claim a line; - for standard input.")
    ],
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
    format: Annotated[
        Format | None, typer.Option(help="By the file's name otherwise.", show_default=False)
    ] = None,
    column: ColumnOption = None,
    revision: RevisionOption = None,
    dtype: DTypeOption = "bfloat16",
    max_model_tokens: MaxTokensOption = 1024,
    engine_argument: EngineArgumentOption = None,
) -> None:
    """Verify a file of claims on this machine, from nothing to a report.

    Without --broker a private RabbitMQ node is started, on loopback and with a password of its
    own, and taken down again. Results are OUT/verdicts.jsonl (a row a claim, input order),
    OUT/report.json and OUT/rejected.jsonl. Stopped half-way, the same command goes on where it was.
    """
    check_seed(limit, seed)
    expect_many_small_objects()
    settings = load_settings(broker_url=broker, store_url=store, batch_size=batch_size)
    console = Console(stderr=True)
    prompt_spec = prompt_from_flag(prompt)
    with ExitStack() as held:
        source = held.enter_context(Source.open(file, format))
        context = context_from_flags(
            settings, model, revision, dtype, max_model_tokens, engine_argument
        )
        # Words that one token cannot tell apart: known now, not after the model is loaded.
        CompiledPrompt(prompt_spec, ModelTokenizer.load(context))
        with line_progress(console, "reading", None) as reading:
            survey = source.survey(reading)
        submission = Submission(
            source,
            survey,
            context=context,
            prompt=prompt_spec,
            columns=columns_from_flags(column),
            limit=limit,
            seed=seed,
        )
        say_ignored_columns(console, submission)
        stem = "stdin" if file == "-" else Path(file).stem
        directory = out or Path("results") / f"{stem}-{submission.run.run_id.removeprefix('run-')}"
        held.enter_context(held_output_dir(directory))
        settings = settings.model_copy(
            update={"store_url": settings.store_url or str(directory / "keepwarm.sqlite")}
        )
        log_file = held.enter_context(_log_file(directory))
        configure_logs(settings, log_file)
        database = Store.open(settings)
        held.callback(database.close)
        desk = _Desk(submission, settings, database, directory, console, workers)
        stopped_by = desk.work()
        desk.write_results()
    if stopped_by is not None:
        console.print("Stopped. The same command goes on where this one ended.")
        sys.exit(128 + stopped_by)


class _Desk:
    """All the parts of one run on one machine, and their end."""

    def __init__(
        self,
        submission: Submission,
        settings: Settings,
        database: Store,
        directory: Path,
        console: Console,
        workers: int,
    ) -> None:
        self._submission = submission
        self._run_id = submission.run.run_id
        self._settings = settings
        self._database = database
        self._directory = directory
        self._console = console
        self._workers = workers
        self._stopped_by: int | None = None
        self._failure: BaseException | None = None
        self._progress = Progress(0, 0, 0)
        self._node: PrivateNode | None = None

    def work(self) -> int | None:
        """Go on until every claim has an outcome. The signal that ended it sooner, if one did.

        Raises what stopped a part that the run cannot do without.
        """
        on_stop_signal(self._stop)
        status = run_status(self._database, self._run_id)
        if status is not None and status.complete:
            self._console.print("Every claim has an outcome already.")
            return None
        with ExitStack() as parts:
            settings, environment = self._broker(parts)
            collector = Collector(self._database, settings)
            parts.callback(collector.stop)
            collecting = self._thread("collector", collector.run)
            parts.callback(collecting.join, 30.0)
            parts.callback(collector.stop)
            publishing = self._thread("producer", lambda: self._publish(settings))
            slots = worker_processes(
                self._workers,
                self._submission.run.context,
                find_device(),
                settings,
                self._directory / "logs",
                environment,
            )
            parts.callback(self._drain, slots)
            for slot in slots:
                slot.start()
            self._watch(slots, publishing)
        if self._failure is not None:
            raise self._failure
        return self._stopped_by

    def write_results(self) -> None:
        """`verdicts.jsonl`, `report.json`, and the report on the screen."""
        try:
            known = find_run(self._database, self._run_id)
        except StoreError:
            return  # stopped before anything was known
        report = build_report(self._database, known)
        export_run(self._database, known, "jsonl", self._directory / "verdicts.jsonl")
        try:
            (self._directory / "report.json").write_text(
                report.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise StoreError(
                f"{self._directory}/report.json cannot be written: {error.strerror}; make room"
            ) from error
        print_report(Console(), report)
        self._console.print(f"Results are in {self._directory}/", highlight=False)

    def _stop(self, signal_number: int) -> None:
        self._stopped_by = signal_number

    def _broker(self, parts: ExitStack) -> tuple[Settings, dict[str, str | None]]:
        """The settings with a broker in them, and what workers need in their environment for it."""
        if self._settings.broker_url is not None:
            # Refused or not there: known before an engine is started.
            address = BrokerAddress.from_settings(self._settings)
            Publisher(address, "check", window=1).open(
                self._settings.broker_connect_timeout_seconds
            ).close()
            self._console.print(
                f"This run's collector takes the verdicts of every run at {address}, into "
                f"{self._directory}; give such a broker to one `keepwarm run` at a time.",
                highlight=False,
            )
            return self._settings, {"KEEPWARM_BROKER_URL": self._settings.broker_url}
        directory = self._directory / ".broker"
        shutil.rmtree(directory, ignore_errors=True)
        parts.callback(shutil.rmtree, directory, ignore_errors=True)
        with self._console.status("starting a private RabbitMQ node"):
            log_file = self._directory.resolve() / "logs" / "rabbitmq.log"
            self._node = parts.enter_context(PrivateNode(directory.resolve(), log_file))
        # The node has a password of its own and no certificate, whatever the environment says.
        settings = self._settings.model_copy(
            update={
                "broker_url": self._node.url,
                "broker_password": SecretStr(self._node.password),
                "broker_password_file": None,
                "broker_ca_file": None,
            }
        )
        return settings, {
            "KEEPWARM_BROKER_URL": self._node.url,
            "KEEPWARM_BROKER_PASSWORD": self._node.password,
            "KEEPWARM_BROKER_PASSWORD_FILE": None,
            "KEEPWARM_BROKER_CA_FILE": None,
        }

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = self._failure or error

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _publish(self, settings: Settings) -> None:
        context_ids = [self._submission.run.context.context_id]
        with (
            Publisher(
                BrokerAddress.from_settings(settings),
                "producer",
                window=settings.publish_window,
                context_ids=context_ids,
            ).open(settings.broker_connect_timeout_seconds) as publisher,
            RejectedFile(self._directory / "rejected.jsonl") as rejections,
        ):
            self._submission.publish(
                publisher,
                rejections,
                batch_size=settings.batch_size,
                finished=finished_in(self._database, self._run_id),
                on_progress=self._note_progress,
            )

    def _note_progress(self, progress: Progress) -> None:
        self._progress = progress

    def _watch(self, slots: list[WorkerProcess], publishing: threading.Thread) -> None:
        with LiveView(self._console, self._submission.lines) as view:
            while self._failure is None and self._stopped_by is None:
                status = run_status(self._database, self._run_id)
                view.show(status, self._progress, [slot.state for slot in slots])
                if status is not None and status.complete and not publishing.is_alive():
                    return
                if self._node is not None and not self._node.alive:
                    raise BrokerError(
                        f"the private RabbitMQ node ended; its log is {self._node.log_file}. The "
                        "same command goes on where this one ended"
                    )
                for slot in slots:
                    slot.look_after()
                time.sleep(_LOOK_SECONDS)

    def _drain(self, slots: list[WorkerProcess]) -> None:
        if self._stopped_by is not None:
            self._console.print("Stopping: workers publish what they have finished …")
        for slot in slots:
            slot.terminate()
        for slot in slots:
            slot.stop()


@contextmanager
def _log_file(directory: Path) -> Iterator[TextIO]:
    path = directory / "logs" / "run.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    with file:
        yield file
