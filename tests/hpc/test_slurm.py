"""The Slurm script as users submit it, on a real Slurm: signalled, taken away, put back."""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.broker import PrivateNode
from tests.conftest import REPOSITORY
from tests.hpc.slurm import OneNodeSlurm
from tests.integration.conftest import Command, wait_until
from tests.integration.runs import (
    assert_complete,
    outcomes,
    submit,
    wait_for_the_first_verdicts,
)

Start = Callable[..., Command]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A node's own disk, with a short name: there are sockets in it."""
    with tempfile.TemporaryDirectory(prefix="kws-") as name:
        yield Path(name)


@pytest.fixture
def of_the_job(
    environment: dict[str, str], node: PrivateNode, scratch: Path, tmp_path: Path
) -> dict[str, str]:
    """What a user exports before `sbatch`; where Keepwarm is, the tests' engine, and a slow one."""
    password = tmp_path / "worker.password"
    password.touch(mode=0o600)
    password.write_text(node.password)
    ours = {"KEEPWARM_BROKER_PASSWORD", "KEEPWARM_RUNTIME_DIR", "KEEPWARM_CACHE_DIR"}
    return {
        **{name: value for name, value in environment.items() if name not in ours},
        "KEEPWARM_BROKER_PASSWORD_FILE": str(password),
        # There is no such GPU as Slurm says.
        "KEEPWARM_COMMAND": f"env -u CUDA_VISIBLE_DEVICES {sys.executable} -m services.cli.main",
        "SLURM_TMPDIR": str(scratch),
        # 36 s of work; and at its end what is in hand, 7 s of it, has half of the grace period.
        "VLLM_TEST_CLAIM_SECONDS": "0.15",
        "KEEPWARM_GRACE_SECONDS": "20",
        "VLLM_TEST_JOURNAL": str(tmp_path / "journal"),
    }


class Job:
    """One task of the array."""

    def __init__(
        self, slurm: OneNodeSlurm, log: Path, environment: dict[str, str], *flags: str
    ) -> None:
        number = slurm.call(
            *("sbatch", "--parsable", f"--chdir={REPOSITORY}"),
            # The node is a small one; everything else is as the script says.
            *("--array=3", "--cpus-per-task=1", "--mem=100", "--time=30", f"--output={log}"),
            *flags,
            str(REPOSITORY / "apptainer" / "slurm" / "worker.sbatch"),
            **environment,
            KEEPWARM_HOME=str(REPOSITORY),
        )
        self.task = f"{number}_3"
        self._slurm, self._log = slurm, log

    @property
    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def said(self, text: str) -> None:
        try:
            wait_until(lambda: text in self.output, f"{text!r} in the job's log")
        except AssertionError as error:
            error.add_note(self.output)
            raise

    def ends_as(self, state: str, restarts: int) -> None:
        self._slurm.wait_for(self.task, state, restarts)


def of_this_job(scratch: Path) -> list[psutil.Process]:
    """Everything that lives in the job's directories: worker, keeper, engine."""
    return [
        process
        for process in psutil.process_iter()
        if any(str(scratch) in value for value in environment_of(process))
    ]


def environment_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.environ().values())
    except psutil.Error:
        return []


def computed(of_the_job: dict[str, str]) -> Counter[str]:
    return Counter(Path(of_the_job["VLLM_TEST_JOURNAL"]).read_text().split())


@pytest.mark.parametrize(
    "asked_by", ["scancel", "preemption", "preemption with a warning", "the walltime"]
)
def test_a_job_that_was_drained_goes_back_into_the_queue_and_completes_the_run(
    asked_by: str,
    command: Start,
    environment: dict[str, str],
    of_the_job: dict[str, str],
    scratch: Path,
    tmp_path: Path,
) -> None:
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    with OneNodeSlurm(scratch, warning=asked_by.endswith("warning")) as slurm:
        if asked_by == "the walltime":
            # Slurm counts in minutes: one, of which 60 - 20 - 5 s are for work, of 48. Its warning,
            # which may come half a minute too early, is one that the script does not hear.
            short = ("--time=1", "--signal=B:CONT@1")
            slow = {**of_the_job, "VLLM_TEST_CLAIM_SECONDS": "0.2"}
            job = Job(slurm, tmp_path / "job.log", slow, *short)
        else:
            job = Job(slurm, tmp_path / "job.log", of_the_job)
        wait_for_the_first_verdicts(collecting, environment)
        job.said("walltime.known")
        (runtime,) = scratch.glob("kw-*")
        assert runtime.stat().st_mode & 0o777 == 0o700
        if asked_by == "scancel":
            slurm.call("scancel", "--signal=USR1", "--batch", job.task)
        elif asked_by != "the walltime":
            slurm.call(
                *("sbatch", "--partition=urgent", "--gres=gpu:1", "--output=/dev/null"),
                "--wrap=sleep 2",
            )
        wait_until(lambda: slurm.job(job.task)["Restarts"] == "1", "the job to be put back")
        wait_until(lambda: not runtime.exists(), "its directory to be gone")
        assert len(outcomes(environment)) < 240
        job.said("restarts 1")
        assert collecting.wait() == 0, collecting.output
        assert_complete(environment, run_id)
        if asked_by != "preemption":  # whose SIGTERM goes to the engine as well
            assert set(computed(of_the_job).values()) == {1}
            assert "back in the queue" in job.output
        slurm.call("scancel", job.task)
        if asked_by == "the walltime":
            job.said("walltime.ending")
        else:
            job.ends_as("CANCELLED", restarts=1)
        wait_until(lambda: not of_this_job(runtime), "all its processes to be gone")


def test_a_job_whose_worker_failed_is_failed_and_not_put_back(
    of_the_job: dict[str, str], scratch: Path, tmp_path: Path
) -> None:
    with OneNodeSlurm(scratch) as slurm:
        job = Job(slurm, tmp_path / "job.log", {**of_the_job, "KEEPWARM_MODEL": "/nowhere"})
        job.ends_as("FAILED", restarts=0)
        assert slurm.job(job.task)["ExitCode"] == "4:0", job.output
        assert not list(scratch.glob("kw-*"))


def test_a_job_that_is_not_to_be_put_back_drains_and_is_done(
    of_the_job: dict[str, str], scratch: Path, tmp_path: Path
) -> None:
    with OneNodeSlurm(scratch) as slurm:
        job = Job(slurm, tmp_path / "job.log", of_the_job, "--no-requeue")
        job.said("walltime.known")
        slurm.call("scancel", "--signal=USR1", "--batch", job.task)
        job.ends_as("COMPLETED", restarts=0)
        job.said("submitted with --no-requeue")
