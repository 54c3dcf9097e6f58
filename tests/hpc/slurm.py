"""A Slurm of one node, of the test's own: private daemons on loopback, gone with the test."""

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from services.broker.private_node import free_ports
from services.node.supervision import SupervisedProcess
from tests.integration.conftest import wait_until

_SBIN = Path("/usr/sbin")
_STOP_SECONDS = 10.0


class OneNodeSlurm:
    """Partition `preemptible`, from which a job in `urgent` takes the node away; one pretended GPU.

    Daemons are supervised: with them ends whatever they started, jobs that left their session too.
    """

    def __init__(self, directory: Path, warning: bool = False) -> None:
        """With a `warning`, a job that is taken away has its `--signal` first."""
        directory = self._directory = directory / "slurm"
        directory.mkdir()
        self._running = ExitStack()
        self.host = socket.gethostname()
        controller, node = free_ports(2)
        (directory / "slurm.conf").write_text(
            f"""
ClusterName=keepwarm-test
SlurmctldHost={self.host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={_me()}
SlurmdUser={_me()}
AuthType=auth/munge
# A job that was put back is not started again before its old credential has run out.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=10
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{"SlurmctldParameters=preempt_send_user_signal" if warning else ""}
GresTypes=gpu
NodeName={self.host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=preemptible Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime={30 if warning else 0}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
        )
        # Slurm counts it and sets CUDA_VISIBLE_DEVICES=0, which whoever is to work must be rid of.
        (directory / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}

    def __enter__(self) -> Self:
        for name in ("state", "spool"):
            (self._directory / name).mkdir()
        key = self._directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        try:
            self._start(
                *("munged", "--foreground", "--force"),
                *("--socket", f"{self._directory}/munge.socket", "--key-file", str(key)),
                *("--pid-file", f"{self._directory}/munged.pid"),
                *("--seed-file", f"{self._directory}/munged.seed"),
            )
            wait_until((self._directory / "munge.socket").exists, "munged's socket")
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", self.host)
            wait_until(lambda: self.state_of_node() == "idle", "a node that is idle")
        except BaseException as error:
            error.add_note(self.logs())
            self._running.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running.close()
        if error is not None:
            error.add_note(self.logs())

    def _start(self, program: str, *arguments: str) -> None:
        output = (self._directory / f"{program}.out").open("ab")
        daemon = SupervisedProcess(
            [str(_SBIN / program), *arguments],
            environment={"PATH": os.environ["PATH"], **self.environment},
            grace_seconds=_STOP_SECONDS,
            output=output,
        )
        self._running.callback(output.close)
        self._running.callback(daemon.stop)

    def logs(self) -> str:
        files = sorted(self._directory.glob("*.out"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-4000:]}" for file in files)

    def call(self, *command: str, **environment: str) -> str:
        """What one of Slurm's commands says; it must succeed."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.logs())
        return done.stdout.strip()

    def state_of_node(self) -> str:
        done = subprocess.run(
            ["sinfo", "-h", "-p", "preemptible", "-o", "%T"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout.strip()

    def job(self, task: str) -> dict[str, str]:
        """What Slurm knows of a job, or of an array's task: JobState, Restarts, ExitCode, …"""
        words = self.call("scontrol", "-o", "show", "job", task).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, task: str, state: str, restarts: int) -> None:
        def is_so() -> bool:
            job = self.job(task)
            return (job["JobState"], job["Restarts"]) == (state, str(restarts))

        wait_until(is_so, f"{task} {state}, restarted {restarts} times")


def _me() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
