"""A run of the samples as tests see it: sent, answered, and looked at in the store."""

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text

from services.contexts.keeper_client import engines
from services.contexts.protocol import ContextRecord
from services.contracts import load_settings
from services.store import RunStatus, Store, run_status
from tests.conftest import REPOSITORY, holds, sample_lines
from tests.integration.conftest import PATIENCE, Command, wait_until

Start = Callable[..., Command]
CLAIMS = str(REPOSITORY / "samples" / "claims.jsonl")
# Twelve seconds for the samples, or until `hurry`: time to do something in the midst of a run.
SLOWLY = {"VLLM_TEST_CLAIM_SECONDS": "0.05"}


def keepers(environment: dict[str, str]) -> list[psutil.Process]:
    lock = Path(environment["KEEPWARM_RUNTIME_DIR"]) / "keeper.lock"
    return [process for process in psutil.process_iter() if holds(process, lock)]


def sqlalchemy_url(environment: dict[str, str]) -> str:
    url = environment["KEEPWARM_STORE_URL"]
    return url.replace("postgresql:", "postgresql+psycopg:") if "://" in url else f"sqlite:///{url}"


def submit(command: Start, file: str | Path = CLAIMS, *arguments: str, **variables: str) -> str:
    """Publish a file in batches of 16; the run's id."""
    submitting = command("submit", str(file), "--batch-size", "16", *arguments, **variables)
    assert submitting.wait() == 0, submitting.output
    return submitting.lines[-1].strip()


def outcomes(
    environment: dict[str, str], run_id: str = "%"
) -> list[tuple[str, str | None, str | None]]:
    """Claim id, label and reason of every outcome in the store, or of one run's."""
    query = text(
        "SELECT claim_id, label, reason FROM outcomes JOIN runs USING (run_key)"
        " WHERE run_id LIKE :run_id"
    )
    engine = create_engine(sqlalchemy_url(environment))
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query, {"run_id": run_id})]
    finally:
        engine.dispose()


def wait_for_the_first_of(out: Path, seconds: float = PATIENCE) -> None:
    """The first verdicts of a `keepwarm run`. Of the lines that it shows, five seconds apart, none
    may fall between a warm engine and the end.
    """
    said = out / "logs" / "worker-0.log"
    wait_until(
        lambda: said.exists() and '"engine.ready"' in said.read_text(), "a warm engine", seconds
    )
    store = {"KEEPWARM_STORE_URL": str(out / "keepwarm.sqlite")}
    wait_until(lambda: outcomes(store), "the first verdicts", seconds)


def status_of(environment: dict[str, str], run_id: str) -> RunStatus | None:
    store = Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"]))
    try:
        return run_status(store, run_id)
    finally:
        store.close()


def context_of(worker: Command) -> str:
    """The context that it said it would serve."""
    (said,) = (line for line in worker.lines if "worker.starting" in line)
    return str(json.loads(said)["context"])


def warm_here(environment: dict[str, str]) -> Sequence[ContextRecord]:
    """The engines that are warm on the commands' node, or on their way."""
    return engines(Path(environment["KEEPWARM_RUNTIME_DIR"]))


@contextmanager
def held(environment: dict[str, str]) -> Iterator[None]:
    """Let the engine stand still: what is done meanwhile is done in the midst of the run."""
    (record,) = warm_here(environment)
    engine = psutil.Process(record.pid)
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def hurry(environment: dict[str, str]) -> None:
    """From now on no claim takes time: what was to be done in the midst of the run is done."""
    Path(environment["VLLM_TEST_HURRY"]).touch()


def wait_for_the_first_verdicts(collecting: Command, environment: dict[str, str]) -> None:
    collecting.said("broker.connected")  # by then it has made the store's tables
    wait_until(lambda: outcomes(environment), "the first verdicts")


def end_well(*services: Command) -> None:
    """SIGTERM; they lived until now, and end in order."""
    for service in services:
        assert service.process.poll() is None, service.output
        service.signal(signal.SIGTERM)
    for service in services:
        assert service.wait() == 0, service.output


def assert_complete(environment: dict[str, str], run_id: str, ids: list[str] | None = None) -> None:
    """Each claim (the samples', unless told otherwise) has one verdict, and is counted once."""
    wanted = sorted(ids or [row["id"] for row in sample_lines()])
    found = outcomes(environment, run_id)
    assert sorted(claim_id for claim_id, _, _ in found) == wanted
    assert all(label for _, label, _ in found)
    status = status_of(environment, run_id)
    assert status is not None
    assert (status.total, status.done, status.dead) == (len(wanted), len(wanted), 0)
    # What was counted as it was written is what is there.
    assert Counter(label for _, label, _ in found) == Counter(status.verdicts)


@dataclass
class UnderWay:
    """A run in the midst of being answered and collected."""

    run_id: str
    collecting: Command
    worker: Command
    environment: dict[str, str]

    @property
    def services(self) -> tuple[Command, Command]:
        return self.collecting, self.worker

    def completes(self, ids: list[str] | None = None) -> None:
        """It does, with each claim once, and the worker that lived through it all ends well."""
        hurry(self.environment)
        assert self.collecting.wait() == 0, self.collecting.output
        assert_complete(self.environment, self.run_id, ids)
        end_well(self.worker)


def go_on(command: Start, environment: dict[str, str], run_id: str, **variables: str) -> UnderWay:
    """Answer and collect a run that was sent, as far as the first verdicts in the store."""
    collecting = command("collect", "--until", run_id, **variables)
    worker = command("worker", **{**SLOWLY, **variables})
    wait_for_the_first_verdicts(collecting, environment)
    return UnderWay(run_id, collecting, worker, environment)


def begin(command: Start, environment: dict[str, str], **variables: str) -> UnderWay:
    """Send the samples, and go on."""
    return go_on(command, environment, submit(command), **variables)


def write_claims(file: Path, lines: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
