"""An installation for benchmarks: RabbitMQ and a collector here, workers as processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.broker import BrokerAddress, Declares, PrivateNode, Publisher
from services.collector import Collector
from services.contexts.keeper_client import drain
from services.contracts import ContextSpec, PromptSpec, load_settings
from services.producer import ClaimsFile, RejectedFile, Selection, Source, Submission
from services.store import RunStatus, Store, run_status

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
KEEPWARM = (sys.executable, "-m", "services.cli.main")


class Installation:
    """A broker, a store, a collector and workers. `variables` are for all commands."""

    def __init__(self, directory: Path, **variables: str) -> None:
        self.directory = directory
        self._node = PrivateNode(directory / "node")
        self._node.start()
        self.settings = load_settings(
            broker_url=self._node.url,
            broker_password=self._node.password,
            store_url=str(directory / "store.sqlite"),
            runtime_dir=directory / "run",
            cache_dir=directory / "cache",
        )
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith("KEEPWARM_")
            },
            "KEEPWARM_BROKER_URL": self._node.url,
            "KEEPWARM_BROKER_PASSWORD": self._node.password,
            "KEEPWARM_STORE_URL": str(directory / "store.sqlite"),
            "KEEPWARM_RUNTIME_DIR": str(directory / "run"),
            "KEEPWARM_CACHE_DIR": str(directory / "cache"),
            "KEEPWARM_MODEL": str(MODEL),
            **variables,
        }
        self.store = Store.open(self.settings)
        self._collector = Collector(self.store, self.settings)
        self._committed = threading.Event()
        self._collecting = threading.Thread(
            target=self._collector.run, args=(lambda _: self._committed.set(),)
        )
        self._collecting.start()
        self._workers: list[subprocess.Popen[Any]] = []
        # SIGTERM cleans up as Ctrl-C does.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

    def worker(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start a worker. It ends when the installation is closed."""
        worker = subprocess.Popen(
            [*KEEPWARM, "worker"],
            env={**self.environment, **variables},
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self._workers.append(worker)
        return worker

    def ready_worker(self, *flags: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
        """A worker that takes claims, and the log line of that event."""
        process = subprocess.Popen(
            [*KEEPWARM, "worker", *flags],
            env={**self.environment, **variables},
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "worker.taking" in line:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                self._workers.append(process)
                return process, line
        raise SystemExit("a worker ended; run `keepwarm worker` to see why")

    def publish(
        self,
        file: Path,
        prompt: PromptSpec,
        context: ContextSpec,
        batch_size: int,
        limit: int | None = None,
    ) -> str:
        """Publish a run, and return its id."""
        with (
            Publisher(
                BrokerAddress.from_settings(self.settings),
                "benchmark",
                window=128,
                declares=Declares("always", (context.context_id,)),
            ).open(10) as publisher,
            RejectedFile(self.directory / "rejected.jsonl") as rejected,
            Source.open(str(file)) as source,
        ):
            submission = Submission(ClaimsFile(source, prompt, Selection(limit=limit)), context)
            submission.inspect(rejected)
            submission.publish(publisher, batch_size=batch_size)
            return submission.run.run_id

    def wait_for(
        self, run_id: str, enough: Callable[[RunStatus], bool] = lambda status: status.complete
    ) -> RunStatus:
        """Wait until the store has enough of a run, by default all of it."""
        while True:
            self._committed.clear()
            status = run_status(self.store, run_id)
            if status is not None and enough(status):
                return status
            self._committed.wait(60)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
        drain(self.settings)
        self._collector.stop()
        self._collecting.join()
        self.store.close()
        self._node.stop()
