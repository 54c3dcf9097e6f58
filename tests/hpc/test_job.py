"""A worker as a batch job, with signals as schedulers and containers send them."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.integration.conftest import Command, wait_until
from tests.integration.runs import (
    assert_complete,
    outcomes,
    submit,
    wait_for_the_first_verdicts,
)

Start = Callable[..., Command]
JOB = REPOSITORY / "apptainer" / "job.sh"

# As Apptainer's starter does where there is no terminal: it stays, and passes every signal on to
# the container's first process. The image's own paths are the repository's.
APPTAINER = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
assert words[:2] == ["exec", "--nv"], words
bound = [value for flag, value in zip(words, words[1:]) if flag == "--bind"]
for directory in bound:
    assert os.path.isdir(directory), f"FATAL: mount source {{directory}} does not exist"
words = words[words.index("worker.sif") + 1:]
words = [word.replace("/opt/keepwarm/", "{REPOSITORY}/") for word in words]
child = subprocess.Popen(words)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda received, _: child.send_signal(received))
sys.exit(child.wait())
"""
KEEPWARM = f"""#!/bin/sh
cd {REPOSITORY} && exec {sys.executable} -m services.cli.main "$@"
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kwj-") as name:
        yield Path(name)


@pytest.fixture
def of_the_job(environment: dict[str, str], scratch: Path) -> dict[str, str]:
    """A node with `keepwarm` and `apptainer` in its PATH, and its own disk."""
    for name, text in {"apptainer": APPTAINER, "keepwarm": KEEPWARM}.items():
        program = scratch / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    ours = {"KEEPWARM_RUNTIME_DIR", "KEEPWARM_CACHE_DIR"}
    return {
        **{name: value for name, value in environment.items() if name not in ours},
        "PATH": f"{scratch / 'bin'}:{os.environ['PATH']}",
        "VLLM_TEST_CLAIM_SECONDS": "0.05",
    }


class Job(Command):
    """job.sh in a process group of its own."""

    program = ()

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(environment, python=JOB)


@pytest.fixture
def start(of_the_job: dict[str, str]) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(**variables: str) -> Job:
        jobs.append(Job({**of_the_job, **variables}))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def signal_all(job: Job, number: int) -> None:
    """As Slurm does: every process of the job, whoever started it."""
    for process in [*job.descendants(), psutil.Process(job.process.pid)]:
        with contextlib.suppress(psutil.Error):  # a short-lived one is gone
            process.send_signal(number)


@pytest.mark.parametrize(
    ("image", "to", "number"),
    [
        ("", "the script", signal.SIGTERM),
        ("", "all processes", signal.SIGTERM),
        ("", "all processes", signal.SIGUSR1),
        ("worker.sif", "the script", signal.SIGUSR1),
        ("worker.sif", "all processes", signal.SIGTERM),
    ],
)
def test_a_signal_drains_the_worker_however_often_it_gets_there(
    image: str,
    to: str,
    number: int,
    start: Callable[..., Job],
    command: Start,
    environment: dict[str, str],
    scratch: Path,
) -> None:
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    job = start(KEEPWARM_IMAGE=image, _CONDOR_SCRATCH_DIR=str(scratch))
    wait_for_the_first_verdicts(collecting, environment)
    (runtime,) = scratch.glob("kw-*")
    if to == "all processes":
        signal_all(job, number)
    else:
        job.signal(number)
    assert job.wait() == 0, job.output
    assert "worker.stopped" in job.output
    assert not runtime.exists()
    wait_until(lambda: not keepers_of(runtime), "the keeper to be gone")
    assert len(outcomes(environment)) < 240
    heir = command("worker")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    heir.signal(signal.SIGTERM)
    assert heir.wait() == 0, heir.output


def keepers_of(runtime: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("KEEPWARM_RUNTIME_DIR") == str(runtime):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_signal_before_the_worker_listens_ends_the_job_in_order(
    start: Callable[..., Job], scratch: Path
) -> None:
    job = start(_CONDOR_SCRATCH_DIR=str(scratch))
    job.said("job: on ")
    job.signal(signal.SIGTERM)
    assert job.wait() == 0, job.output


def test_the_hubs_directory_is_made_before_it_is_bound(
    start: Callable[..., Job], scratch: Path
) -> None:
    hub = scratch / "hub" / "of mine"
    job = start(
        KEEPWARM_IMAGE="worker.sif",
        KEEPWARM_MODEL="/nowhere",
        HF_HOME=str(hub),
        _CONDOR_SCRATCH_DIR=str(scratch),
    )
    assert job.wait() == 4, job.output  # as the worker ends without a model
    assert hub.is_dir()


def test_a_signal_to_all_processes_does_not_end_the_tidying(
    start: Callable[..., Job], scratch: Path
) -> None:
    remove = scratch / "bin" / "rm"
    remove.write_text('#!/bin/sh\nkill -TERM $$\nexec /bin/rm "$@"\n')
    remove.chmod(0o755)
    job = start(_CONDOR_SCRATCH_DIR=str(scratch), KEEPWARM_MODEL="/nowhere")
    assert job.wait() == 4, job.output
    assert not list(scratch.glob("kw-*"))


def test_a_long_scratch_path_makes_way_for_a_short_one(
    start: Callable[..., Job], scratch: Path
) -> None:
    long = scratch / ("long" * 20)
    long.mkdir()
    job = start(_CONDOR_SCRATCH_DIR=str(long))
    job.said("engine.ready")
    assert not list(long.glob("kw-*"))
    job.signal(signal.SIGTERM)
    assert job.wait() == 0, job.output


def test_a_worker_that_fails_gives_the_job_its_exit_code(start: Callable[..., Job]) -> None:
    job = start(KEEPWARM_MODEL="/nowhere")
    assert job.wait() == 4, job.output


def test_a_worker_that_crashes_is_started_again_in_its_job_and_finds_what_the_first_one_left(
    start: Callable[..., Job], command: Start, environment: dict[str, str], scratch: Path
) -> None:
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    job = start(_CONDOR_SCRATCH_DIR=str(scratch))
    wait_for_the_first_verdicts(collecting, environment)
    job.descendant(lambda words: words[-2:] == ["services.cli.main", "worker"]).send_signal(
        signal.SIGSEGV
    )
    job.said("the worker crashed with 139; starting it again (1 of 10)")
    job.said("worker.died_before")
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, run_id)
    job.signal(signal.SIGTERM)
    assert job.wait() == 0, job.output
