"""All the parts of one run on one machine: started together, watched, and ended in order."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pydantic import SecretStr
from rich.status import Status

from services.broker import BrokerAddress, Declares, PrivateNode, Publisher
from services.cli.finished import finished_in
from services.cli.label_mass import MassWatch
from services.cli.live_view import LiveView
from services.cli.screen import Screen, print_report, say
from services.cli.worker_processes import WorkerProcess, device_shares, worker_processes
from services.collector import Collector
from services.contexts.borrowed_broker import BorrowedBroker, borrow_broker
from services.contexts.start_keeper import kept_meanwhile
from services.contracts import Settings, topology
from services.contracts.errors import BrokerError, RunIncomplete, StoreError
from services.node.device import find_device
from services.node.signals import on_stop_signal
from services.producer import Progress, Submission
from services.store import Incoming, Store, build_report, export_run, find_run, run_status
from services.telemetry import MetricsServer

_SHORTEST_LOOK_SECONDS, _LOOK_SECONDS = 0.05, 0.2
_REST = 3.0
_COLLECT_SECONDS = 30.0
_MOST_NODE_STARTS = 5


class Desk:
    """All the parts of one run on one machine, and their end."""

    def __init__(
        self,
        submission: Submission,
        settings: Settings,
        database: Store,
        directory: Path,
        place: Path,
        console: Screen,
        workers: int,
        mass: MassWatch,
    ) -> None:
        """Results go to `directory`; the private node's data are in `place`, on a local disk."""
        self._submission = submission
        self._run_id = submission.run.run_id
        self._settings = settings
        self._database = database
        self._directory = directory
        self._place = place
        self._console = console
        self._workers = workers
        self._mass = mass
        self._stopped_by: int | None = None
        self._failure: BaseException | None = None
        self._progress = Progress(0, 0, 0)
        self._node: PrivateNode | None = None
        self._node_starts = 0
        self._committed = threading.Event()
        self._borrowed: BorrowedBroker | None = None
        self._complete = False
        self._publisher: Publisher | None = None

    def work(self) -> int | None:
        """Go on until every claim has an outcome. The signal that ended it sooner, if one did.

        Raises what stopped a part that the run cannot do without.
        """
        on_stop_signal(self._stop)
        status = run_status(self._database, self._run_id)
        if status is not None and status.complete and status.total:
            self._console.print("Every claim has an outcome already.")
            self._mass.ends(status)
            return None
        if self._mass.ends(status):
            return None
        shares = device_shares(self._workers, find_device())
        ending = self._console.status("")
        with ExitStack() as parts:
            parts.callback(ending.stop)
            try:
                settings, environment = self._broker(parts)
            except BrokerError:
                if self._stopped_by is None:
                    raise
                return self._stopped_by
            parts.callback(ending.update, "stopping the engine and RabbitMQ")
            collector = Collector(self._database, settings)
            metrics = parts.enter_context(MetricsServer(settings))
            metrics.serve(collector, {"/sd": collector.targets})
            collecting = self._thread("collector", lambda: collector.run(self._note_commit))
            # Undone from the last to the first: workers publish what they have finished, the
            # collector takes it, and then the node may go.
            parts.callback(collecting.join, _COLLECT_SECONDS)
            parts.callback(collector.finish)
            parts.callback(ending.update, "storing the last verdicts")
            publishing = self._thread("producer", lambda: self._publish(settings))
            slots = worker_processes(
                shares,
                self._submission.run.context,
                settings,
                self._directory / "logs",
                environment,
            )
            parts.callback(self._drain, slots, ending)
            for slot in slots:
                slot.start()
            self._watch(slots, publishing, collector, settings)
        # Once more for the last verdicts: a small run is complete before it is looked at.
        self._mass.ends(run_status(self._database, self._run_id))
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
        print_report(Screen(), report)
        say(self._console, f"Results are in {self._directory}/")

    def _stop(self, signal_number: int) -> None:
        self._stopped_by = signal_number

    def _is_stopped(self) -> bool:
        return self._stopped_by is not None

    def _broker(self, parts: ExitStack) -> tuple[Settings, dict[str, str | None]]:
        """The settings with a broker in them, and what workers need in their environment for it."""
        if self._settings.broker_url is not None:
            # Refused or not there: known before an engine is started.
            address = BrokerAddress.from_settings(self._settings)
            Publisher(address, "check", window=1).open(
                self._settings.broker_connect_timeout_seconds, self._is_stopped
            ).close()
            say(
                self._console,
                f"This run's collector takes the verdicts of every run at {address}, into "
                f"{self._directory}; give such a broker to one `keepwarm run` at a time.",
            )
            from services.broker.policies import ask_policies  # with a client for HTTP

            context_id = self._submission.run.context.context_id
            policies = ask_policies(self._settings, [topology.claims_queue(context_id)])
            for harm in policies.problems:
                say(self._console, f"Warning: {harm}")
            self._keep(parts)
            return self._settings, {"KEEPWARM_BROKER_URL": self._settings.broker_url}
        with self._console.status("starting RabbitMQ"):
            node = self._borrowed_node(parts) or self._own_node(parts)
        # The node has a password of its own and no certificate, whatever the environment says.
        settings = self._settings.model_copy(
            update={
                "broker_url": node.url,
                "broker_password": SecretStr(node.password),
                "broker_password_file": None,
                "broker_ca_file": None,
                "broker_cert_file": None,
                "broker_key_file": None,
            }
        )
        return settings, {
            "KEEPWARM_BROKER_URL": node.url,
            "KEEPWARM_BROKER_PASSWORD": node.password,
            "KEEPWARM_BROKER_PASSWORD_FILE": None,
            "KEEPWARM_BROKER_CA_FILE": None,
            "KEEPWARM_BROKER_CERT_FILE": None,
            "KEEPWARM_BROKER_KEY_FILE": None,
        }

    def _borrowed_node(self, parts: ExitStack) -> BorrowedBroker | None:
        """That of this node's keeper, which is warm if a run was here lately."""
        borrowed = borrow_broker(self._settings, self._is_stopped)
        if borrowed is not None:
            self._borrowed = borrowed
            parts.callback(borrowed.close)
            parts.callback(self._give_back, borrowed)
        return borrowed

    def _give_back(self, borrowed: BorrowedBroker) -> None:
        """After all parts of the run have closed their connections to it."""
        if self._complete and self._failure is None:
            borrowed.give_back(topology.claims_queue(self._submission.run.context.context_id))

    def _own_node(self, parts: ExitStack) -> PrivateNode:
        """One that is here for this run alone. The keeper starts meanwhile, where there is none."""
        directory = self._place.resolve() / ".broker"
        shutil.rmtree(directory, ignore_errors=True)
        parts.callback(shutil.rmtree, directory, ignore_errors=True)
        self._node = PrivateNode(directory, self._directory.resolve() / "logs" / "rabbitmq.log")
        parts.callback(self._node.kill)
        starting = parts.enter_context(ThreadPoolExecutor(1)).submit(
            self._node.start, self._is_stopped
        )
        self._keep(parts)
        starting.result()
        return self._node

    def _keep(self, parts: ExitStack) -> None:
        """A keeper for this run's engine, where the node has none."""
        log_file = self._directory / "logs" / "keeper.log"
        parts.enter_context(kept_meanwhile(self._settings, log_file, self._is_stopped))

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
        with (
            Publisher(
                BrokerAddress.from_settings(settings),
                "producer",
                window=settings.publish_window,
                declares=Declares("if-missing", (self._submission.run.context.context_id,)),
            ).open(settings.broker_connect_timeout_seconds) as publisher,
        ):
            self._publisher = publisher
            self._submission.publish(
                publisher,
                batch_size=settings.batch_size,
                order_by_evidence=settings.order_by_evidence,
                finished=finished_in(self._database, self._run_id),
                on_progress=self._note_progress,
            )

    def _blocked(self) -> str | None:
        if self._publisher is None or self._publisher.blocked_by is None:
            return None
        return f"the broker takes no claims at the moment: {self._publisher.blocked_by}"

    def _note_commit(self, _: Incoming) -> None:
        self._committed.set()

    def _note_progress(self, progress: Progress) -> None:
        self._progress = progress

    def _watch(
        self,
        slots: list[WorkerProcess],
        publishing: threading.Thread,
        collector: Collector,
        settings: Settings,
    ) -> None:
        with LiveView(self._console, self._submission.lines) as view:
            while self._failure is None and self._stopped_by is None:
                began = time.monotonic()
                status = run_status(self._database, self._run_id)
                view.show(
                    status,
                    self._progress,
                    slots,
                    waiting_for=collector.waiting_for or self._blocked(),
                )
                if self._database.is_active(self._submission.submission_id) is False:
                    raise RunIncomplete(
                        f"{self._run_id} was cancelled; the same command goes on with it"
                    )
                if status is not None and status.complete and not publishing.is_alive():
                    self._complete = True
                    return
                if status is not None and status.proven is False and not publishing.is_alive():
                    raise RunIncomplete(
                        f"{self._run_id} has outcomes of claims that the file does not have; the "
                        "same command removes them, and goes on"
                    )
                if self._mass.ends(status):
                    return
                if (
                    status is not None
                    and status.nowhere_since is not None
                    and not publishing.is_alive()
                ):
                    self._console.print("RabbitMQ lost claims; sending them again.")
                    publishing = self._thread("producer", lambda: self._publish(settings))
                if self._borrowed is not None and self._borrowed.gone:
                    raise BrokerError(
                        "this node's keeper ended, and the RabbitMQ that it had lent to this run "
                        "with it; rerun the same command to resume the run"
                    )
                if self._node is not None and not self._node.alive:
                    self._start_again(self._node)
                for slot in slots:
                    slot.look_after()
                # What is committed is shown at once. To add up a large run takes time that the
                # collector, a thread of this process, needs as well.
                time.sleep(_SHORTEST_LOOK_SECONDS + _REST * (time.monotonic() - began))
                self._committed.wait(_LOOK_SECONDS)
                self._committed.clear()

    def _start_again(self, node: PrivateNode) -> None:
        """The node was killed: its queues are on its disk, and everybody is waiting for it."""
        self._node_starts += 1
        if self._node_starts > _MOST_NODE_STARTS:
            raise BrokerError(
                f"the private RabbitMQ node ended again and again; its log is {node.log_file}. The "
                "same command goes on where this one ended"
            )
        self._console.print("RabbitMQ ended; starting it again.")
        node.start()

    def _drain(self, slots: list[WorkerProcess], ending: Status) -> None:
        if self._stopped_by is not None:
            self._console.print("Stopping: workers publish what they have finished …")
        elif self._failure is None and not self._console.is_terminal:
            self._console.print("Stopping the workers.")
        ending.update("waiting for the workers to stop")
        ending.start()
        for slot in slots:
            slot.terminate()
        for slot in slots:
            slot.stop()
