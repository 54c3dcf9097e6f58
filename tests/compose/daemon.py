"""A Docker daemon of the test's own, which leaves nothing behind whatever ends the test.

It lives in namespaces of its own: processes, mounts and, but for builds, networks. So its bridges
and packet filters are none of this machine's; when the first of its processes goes, the kernel
takes all others and every mount along. It is supervised, so that it ends with the test, even
with one that is killed.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.node.supervision import SupervisedProcess

_PATIENCE_SECONDS = 240.0
_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")


class Daemon:
    """One directory of images, containers and volumes, with a daemon or without."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.log_file = directory / "dockerd.log"
        directory.mkdir(exist_ok=True)

    @contextmanager
    def running(self, *, network_of_its_own: bool) -> Iterator[None]:
        """With the machine's network it can build, and makes no network. Without, the other way."""
        isolated = ("--net",) if network_of_its_own else ()
        flags = () if network_of_its_own else ("--bridge=none", "--iptables=false")
        dockerd = [
            *("dockerd", "--host", f"unix://{self.socket}", "--data-root", self.directory / "data"),
            *("--exec-root", self.directory / "exec", "--pidfile", self.directory / "dockerd.pid"),
            *("--cgroup-parent", self._control_group, "--ip-forward=false", "--log-level", "warn"),
            *flags,
        ]
        script = 'if [ "$1" = yes ]; then ip link set lo up; fi; shift; exec "$@"'
        self.socket.unlink(missing_ok=True)
        (self.directory / "dockerd.pid").unlink(missing_ok=True)
        with self.log_file.open("ab") as output:
            process = SupervisedProcess(
                [
                    *(*_NAMESPACES, *isolated, "sh", "-c", script, "sh"),
                    *("yes" if network_of_its_own else "no", *map(str, dockerd)),
                ],
                environment={**os.environ, "TMPDIR": "/tmp"},
                grace_seconds=60,
                output=output,
            )
        try:
            self._wait(process)
            yield
        finally:
            process.stop()
            self._remove_control_groups()

    def docker(self, *arguments: object, **options: object) -> str:
        """What the command says. Raises AssertionError where it fails."""
        return run("docker", *arguments, environment=self.environment, **options)

    @property
    def environment(self) -> dict[str, str]:
        """For clients. BuildKit's front end would come from a registry."""
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.directory), "LANG": "C.UTF-8"}
        address = {"DOCKER_HOST": f"unix://{self.socket}"}
        return {**kept, **address, "DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}

    @property
    def _control_group(self) -> str:
        return f"/keepwarm-test-{os.getpid()}"

    def _wait(self, process: SupervisedProcess) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        asked = ["docker", "version"]
        while subprocess.run(asked, env=self.environment, capture_output=True).returncode != 0:
            said = self.log_file.read_text()[-3000:]
            assert process.exit_code() is None, f"dockerd ended:\n{said}"
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{said}"
            time.sleep(0.2)

    def _remove_control_groups(self) -> None:
        """They outlive their processes; empty they may go. One tree, or with version 1 several."""
        top = Path("/sys/fs/cgroup")
        for tree in (top, *top.iterdir()):
            group = tree / self._control_group.strip("/")
            if group.is_dir():
                for inner in sorted(filter(Path.is_dir, group.rglob("*")), reverse=True):
                    inner.rmdir()
                group.rmdir()


def run(
    *command: object, environment: dict[str, str], check: bool = True, **options: object
) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
    return str(done.stdout)
