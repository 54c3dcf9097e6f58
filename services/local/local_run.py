"""Runs on one machine: their services are started, watched, and stopped in order."""

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from services.broker import BrokerAddress, Declares, PrivateNode, Publisher
from services.collector import Collector
from services.contexts.borrowed_broker import BorrowedBroker, borrow_broker
from services.contexts.keeper_client import temporary_keeper
from services.contracts import Settings, topology
from services.contracts.errors import BrokerError, KeepwarmError, RunIncomplete
from services.local.worker_processes import WorkerProcess, device_shares, worker_processes
from services.node.device import find_device
from services.node.signals import on_stop_signal
from services.producer import Submission
from services.producer.submission import Finished
from services.store import Incoming, RunStatus, Store, find_run, run_status
from services.telemetry import MetricsServer

_MIN_POLL_SECONDS, _POLL_SECONDS = 0.05, 0.2
_COLLECT_SECONDS = 30.0
_MAX_NODE_RESTARTS = 5


class RunObserver(Protocol):
    """Shows runs to their user. All calls come from the thread that called `LocalRun.run`."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def phase(self, text: str | None) -> None:
        """What the runs wait for, before and after they compute; None when the wait is over."""

    def progress(
        self,
        statuses: Mapping[str, RunStatus | None],
        workers: Sequence[WorkerProcess],
        *,
        current: str | None,
        waiting_for: str | None,
    ) -> None:
        """The state of all runs, by run id, about once a second or more often while they compute.
        None for a run that is not announced yet. `current`: the run that is computed now.
        """

    def workers_stopping(self, *, interrupted: bool) -> None:
        """The workers are asked to stop; `interrupted`: because of a signal."""

    def should_stop(self, status: RunStatus | None) -> bool:
        """Whether the verdicts so far are a reason to stop this run."""


class LocalRun:
    """All services of some runs on one machine: one broker, collector, store and keeper.

    Runs on one context are computed by the same workers, one run after the other. Contexts follow
    each other, those of one engine without another between them, so that no engine is started
    twice.
    """

    def __init__(
        self,
        submissions: Sequence[Submission],
        settings: Settings,
        store: Store,
        observer: RunObserver,
        finished: Callable[[str], Finished],
        *,
        output_dir: Path,
        data_dir: Path,
        workers: int,
    ) -> None:
        """Logs go to `output_dir`. `data_dir`, on a local disk, has the private node's data.
        `finished` gives, for a run id, the claims that need not be sent.
        """
        self._submissions = submissions
        self._statuses: dict[str, RunStatus | None] = {}
        self.failures: dict[str, KeepwarmError] = {}
        """After `run`: why a run ended before its claims had outcomes, by run id. Other runs went
        on."""
        self._settings = settings
        self._store = store
        self._observer = observer
        self._finished = finished
        self._logs = output_dir / "logs"
        self._output_dir = output_dir
        self._data_dir = data_dir
        self._workers = workers
        self._stopped_by: int | None = None
        self._failure: BaseException | None = None
        self._private_node: PrivateNode | None = None
        self._has_temporary_keeper = False
        self._node_restarts = 0
        self._committed = threading.Event()
        self._borrowed: BorrowedBroker | None = None
        self._publisher: Publisher | None = None
        self._sent: set[str] = set()

    def run(self) -> int | None:
        """Work until every claim has an outcome. Returns the signal that ended it sooner, or None.

        Raises the error of a service that all runs need; errors of one run or of its context are in
        `failures`.
        """
        on_stop_signal(self._stop)
        unfinished = [each for each in self._submissions if not self._is_finished(each)]
        if not unfinished:
            if self._all_complete():
                self._observer.message("Every claim has an outcome already.")
            return None
        shares = device_shares(self._workers, find_device())
        with ExitStack() as services:
            services.callback(self._observer.phase, None)
            try:
                settings, environment = self._start_broker(services)
            except BrokerError:
                if self._stopped_by is None:
                    raise
                return self._stopped_by
            services.callback(self._observer.phase, self._last_phase())
            collector = Collector(self._store, settings)
            metrics = services.enter_context(MetricsServer(settings))
            metrics.serve(collector, {"/sd": collector.targets})
            collecting = self._start_thread("collector", lambda: collector.run(self._note_commit))
            # The stack stops them from the last to the first: workers publish what they have
            # finished, the collector stores it, and then the broker ends.
            services.callback(collecting.join, _COLLECT_SECONDS)
            services.callback(collector.finish)
            services.callback(self._observer.phase, "storing the last verdicts")
            for group in by_context(unfinished):
                if self._failure is None and self._stopped_by is None:
                    workers = worker_processes(
                        shares, group[0].run.context, settings, self._logs, environment
                    )
                    self._compute(group, workers, collector, settings)
        # Once more for the last verdicts: a small run may be complete before the first check.
        for submission in self._submissions:
            self._observer.should_stop(run_status(self._store, submission.run.run_id))
        if self._failure is not None:
            raise self._failure
        return self._stopped_by

    def _is_finished(self, submission: Submission) -> bool:
        """Note the run's status. Whether nothing is left to compute, or the user has to decide."""
        run_id = submission.run.run_id
        status = self._statuses[run_id] = run_status(self._store, run_id)
        should_stop = self._observer.should_stop(status)
        return should_stop or (status is not None and status.complete and bool(status.total))

    def _all_complete(self) -> bool:
        return all(status is not None and status.complete for status in self._statuses.values())

    def _stop(self, signal_number: int) -> None:
        self._stopped_by = signal_number

    def _is_stopped(self) -> bool:
        return self._stopped_by is not None

    def _start_broker(self, services: ExitStack) -> tuple[Settings, dict[str, str | None]]:
        """The settings with the broker's address, and the workers' environment variables for it."""
        if self._settings.broker_url is not None:
            self._check_broker()
            self._start_keeper(services)
            return self._settings, {"KEEPWARM_BROKER_URL": self._settings.broker_url}
        self._observer.phase("starting RabbitMQ")
        try:
            node = self._borrow_node(services) or self._start_private_node(services)
        finally:
            self._observer.phase(None)
        # The node has its own password and no certificate, whatever the environment says.
        own = {
            "broker_url": node.url,
            "broker_password": node.password,
            "broker_password_file": None,
            "broker_ca_file": None,
            "broker_cert_file": None,
            "broker_key_file": None,
        }
        settings = self._settings.model_copy(
            update={**own, "broker_password": SecretStr(node.password)}
        )
        return settings, {f"KEEPWARM_{name.upper()}": value for name, value in own.items()}

    def _check_broker(self) -> None:
        """Raises BrokerError when the user's broker cannot be used: before an engine is started."""
        address = BrokerAddress.from_settings(self._settings)
        Publisher(address, "check", window=1).open(
            self._settings.broker_connect_timeout_seconds, self._is_stopped
        ).close()
        self._observer.message(
            f"This run's collector takes the verdicts of every run at {address} and stores them in "
            f"{self._output_dir}; use such a broker for one `keepwarm run` at a time.",
        )
        from services.broker.policies import check_policies  # imports an HTTP client

        policies = check_policies(self._settings, self._claims_queues())
        for harm in policies.problems:
            self._observer.message(f"Warning: {harm}")

    def _borrow_node(self, services: ExitStack) -> BorrowedBroker | None:
        """The broker of this node's keeper, which is warm if a run was here recently."""
        borrowed = borrow_broker(self._settings, self._is_stopped)
        if borrowed is not None:
            self._borrowed = borrowed
            services.callback(borrowed.close)
            services.callback(self._give_back, borrowed)
        return borrowed

    def _give_back(self, borrowed: BorrowedBroker) -> None:
        """After all services of the run have closed their connections to it. A broker with queues
        of several contexts is not given back, because the keeper would check only one of them.
        """
        queues = self._claims_queues()
        if self._all_complete() and self._failure is None and len(queues) == 1:
            borrowed.give_back(queues[0])

    def _claims_queues(self) -> list[str]:
        contexts = dict.fromkeys(each.run.context.context_id for each in self._submissions)
        return [topology.claims_queue(context_id) for context_id in contexts]

    def _start_private_node(self, services: ExitStack) -> PrivateNode:
        """A broker for this run alone. The keeper, if there is none, starts at the same time."""
        directory = self._data_dir.resolve() / ".broker"
        shutil.rmtree(directory, ignore_errors=True)
        services.callback(shutil.rmtree, directory, ignore_errors=True)
        self._private_node = PrivateNode(directory, self._logs.resolve() / "rabbitmq.log")
        services.callback(self._private_node.kill)
        starting = services.enter_context(ThreadPoolExecutor(1)).submit(
            self._private_node.start, self._is_stopped
        )
        self._start_keeper(services)
        starting.result()
        return self._private_node

    def _start_keeper(self, services: ExitStack) -> None:
        """Start a keeper for this run's engine, unless the node has one."""
        log_file = self._logs / "keeper.log"
        self._has_temporary_keeper = services.enter_context(
            temporary_keeper(self._settings, log_file, self._is_stopped)
        )

    def _last_phase(self) -> str | None:
        """What the end of the run waits for. A keeper that was there before, and a broker that the
        run did not start, stay.
        """
        ends = ["the engine"] if self._has_temporary_keeper else []
        ends += ["RabbitMQ"] if self._private_node is not None else []
        return f"stopping {' and '.join(ends)}" if ends else None

    def _start_thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = self._failure or error

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _publish(self, submissions: Sequence[Submission], settings: Settings) -> None:
        """Send runs of one context. Without interruption, so that a worker has a run's prompt in
        its engine's prefix cache, and then the next one's.
        """
        context_id = submissions[0].run.context.context_id
        with (
            Publisher(
                BrokerAddress.from_settings(settings),
                "producer",
                window=settings.publish_window,
                declares=Declares("if-missing", (context_id,)),
            ).open(settings.broker_connect_timeout_seconds) as publisher,
        ):
            self._publisher = publisher
            for submission in submissions:
                submission.publish(
                    publisher,
                    batch_size=settings.batch_size,
                    order_by_evidence=settings.order_by_evidence,
                    finished=self._finished(submission.run.run_id),
                )
                self._sent.add(submission.run.run_id)

    def _note_commit(self, _: Incoming) -> None:
        self._committed.set()

    def _waiting_for(self, collector: Collector) -> str | None:
        if collector.waiting_for is not None:
            return collector.waiting_for
        if self._publisher is None or self._publisher.blocked_by is None:
            return None
        return f"the broker accepts no claims at the moment: {self._publisher.blocked_by}"

    def _compute(
        self,
        submissions: Sequence[Submission],
        workers: Sequence[WorkerProcess],
        collector: Collector,
        settings: Settings,
    ) -> None:
        """Send runs of one context and have them answered. Errors of the context are in `failures`
        afterwards.
        """
        try:
            for worker in workers:
                worker.start()
            self._watch(submissions, workers, collector, settings)
        finally:
            self._drain(workers)

    def _watch(
        self,
        submissions: Sequence[Submission],
        workers: Sequence[WorkerProcess],
        collector: Collector,
        settings: Settings,
    ) -> None:
        """Until each of these runs is complete, has failed or should stop."""
        unfinished = [*submissions]
        publishing = self._start_publishing(submissions, settings)
        while self._failure is None and self._stopped_by is None:
            unfinished = [each for each in unfinished if not self._has_ended(each)]
            for worker in workers:
                worker.update(collector.worker(worker.worker_id), collector.broker_error)
            self._observer.progress(
                self._statuses,
                workers,
                current=unfinished[0].run.run_id if unfinished else None,
                waiting_for=self._waiting_for(collector),
            )
            if not unfinished:
                return
            lost = [each for each in unfinished if self._is_nowhere(each)]
            if lost and not publishing.is_alive():
                self._observer.message("RabbitMQ lost claims; sending them again.")
                publishing = self._start_publishing(lost, settings)
            if self._borrowed is not None and self._borrowed.ended:
                collector.stop()  # it would wait for this broker, which does not return
                raise BrokerError(
                    "this node's keeper ended, and with it the RabbitMQ node that this run used; "
                    "rerun the command to resume the run"
                )
            if self._private_node is not None and not self._private_node.alive:
                self._restart(self._private_node)
            try:
                for worker in workers:
                    worker.replace_if_lost()
            except KeepwarmError as error:
                self.failures |= {each.run.run_id: error for each in unfinished}
                return
            # The pause ends when verdicts are committed. Each check reads each unfinished run.
            time.sleep(_MIN_POLL_SECONDS * len(unfinished))
            self._committed.wait(_POLL_SECONDS)
            self._committed.clear()

    def _has_ended(self, submission: Submission) -> bool:
        """Note the run's status. Whether it is complete, has failed, or should stop."""
        run_id = submission.run.run_id
        status = self._statuses[run_id] = run_status(self._store, run_id)
        if self._store.is_active(submission.submission_id) is False:
            self.failures[run_id] = RunIncomplete(
                f"{run_id} was cancelled; rerun the command to resume it"
            )
            return True
        if status is not None and run_id in self._sent:
            if status.complete:
                return True
            if status.proven is False:
                self.failures[run_id] = RunIncomplete(
                    f"{run_id} has outcomes of claims that are not in the file; rerun the command "
                    "to remove them and to resume the run"
                )
                return True
        if not self._observer.should_stop(status):
            return False
        if len(self._submissions) > 1:  # workers discard its claims, and go on with other runs
            self._store.cancel(find_run(self._store, run_id).run_key)
        return True

    def _is_nowhere(self, submission: Submission) -> bool:
        status = self._statuses[submission.run.run_id]
        return status is not None and status.nowhere_since is not None

    def _start_publishing(
        self, submissions: Sequence[Submission], settings: Settings
    ) -> threading.Thread:
        self._sent -= {each.run.run_id for each in submissions}
        return self._start_thread("producer", lambda: self._publish(submissions, settings))

    def _restart(self, node: PrivateNode) -> None:
        """Start a node that was killed. Its queues are on its disk, and all clients reconnect."""
        self._node_restarts += 1
        if self._node_restarts > _MAX_NODE_RESTARTS:
            raise BrokerError(
                f"the private RabbitMQ node ended {self._node_restarts} times; see its log, "
                f"{node.log_file}, and rerun the command to resume the run"
            )
        self._observer.message("RabbitMQ ended; starting it again.")
        try:
            node.start(self._is_stopped)
        except BrokerError:
            if not self._is_stopped():
                raise

    def _drain(self, workers: Sequence[WorkerProcess]) -> None:
        self._observer.workers_stopping(interrupted=self._stopped_by is not None)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.stop()


def by_context(submissions: Iterable[Submission]) -> list[list[Submission]]:
    """The runs of each context, in their order. Contexts that share an engine, which are adapters
    of one model, follow each other.
    """
    engines: dict[tuple[str, bool], dict[str, list[Submission]]] = {}
    for submission in submissions:
        context = submission.run.context
        of_engine = engines.setdefault((context.base.context_id, context.adapter is None), {})
        of_engine.setdefault(context.context_id, []).append(submission)
    return [group for of_engine in engines.values() for group in of_engine.values()]
