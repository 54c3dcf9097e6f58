"""A PostgreSQL server of a test's own, which can be stopped and started like a machine's."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from services.broker.private_node import free_ports
from tests.certificates import Certificate

_PATIENCE_SECONDS = 240.0
_PGBOUNCER = Path("/usr/sbin/pgbouncer")
_POOL_PORT = 6432


class PostgreSQL:
    """Listens on a socket in a directory of its own, and nowhere else. Use it as a context manager.

    The server is a direct child of ours, which dies when we do. Its directory is not one of
    pytest's: when another pytest starts, it closes their common parent to all other users, and
    PostgreSQL, which refuses to run as root, would be shut out of its own data.
    """

    def __init__(self) -> None:
        """Raises FileNotFoundError where the server is not installed."""
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        if not programs:
            raise FileNotFoundError("/usr/lib/postgresql/*/bin/postgres")
        self._programs = programs[-1].parent
        self._directory = Path(tempfile.mkdtemp(prefix="keepwarm-pg-"))
        self._data = self._directory / "data"
        self._log = self._directory / "log"
        self._become: list[str] = []
        self._databases = 0
        self._port = 5432
        self._server: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._directory, user.pw_uid, user.pw_gid)
            self._become = [
                *("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"),
                "--pdeathsig=QUIT",
            ]

    def new_database(self, encoding: str = "UTF8") -> str:
        """The URL of a database with nothing in it."""
        self._databases += 1
        name = f"keepwarm{self._databases}"
        self._run(
            *("createdb", "-h", str(self._directory), "-p", str(self._port), "-U", "keepwarm"),
            *("-T", "template0", "--locale=C", "-E", encoding, name),
        )
        return f"postgresql://keepwarm@/{name}?host={self._directory}&port={self._port}"

    def __enter__(self) -> Self:
        try:
            self._run("initdb", "-D", str(self._data), "-U", "keepwarm", "--auth=trust", "-N")
            with (self._data / "postgresql.auto.conf").open("a") as settings:
                settings.write("listen_addresses=''\n")
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                [
                    *(*self._become, str(self._programs / "postgres"), "-D", str(self._data)),
                    *("-k", str(self._directory), "-c", "fsync=off"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
            )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._is_ready():
            code = self._server.poll()
            if code is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start ({code}):\n{self.log}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End it: SIGQUIT is its immediate shutdown, as in a crash, SIGINT its fast one."""
        if self._server is None:
            return
        self._server.send_signal(how)
        try:
            self._server.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
            raise AssertionError(f"PostgreSQL did not stop:\n{self.log}") from None
        finally:
            self._server = None

    def tls(self, authority: Certificate, shows: Certificate, *, wants_certificate: bool) -> str:
        """The URL of a database through TLS, without sslmode. The server is started again with
        these certificates, and the database is empty.
        """
        name = self.new_database().partition("?")[0].rpartition("/")[2]
        for source, target in (
            (shows.file, "server.crt"),
            (shows.key, "server.key"),
            (authority.file, "root.crt"),
        ):
            copy = self._data / target
            copy.write_bytes(source.read_bytes())
            copy.chmod(0o600)
            shutil.chown(copy, self._data.owner(), self._data.group())
        (port,) = free_ports(1)
        with (self._data / "postgresql.auto.conf").open("a") as settings:
            settings.write(
                f"listen_addresses='127.0.0.1'\nport={port}\nssl=on\nssl_ca_file='root.crt'\n"
            )
        method = "cert" if wants_certificate else "trust"
        (self._data / "pg_hba.conf").write_text(
            f"local all all trust\nhostssl all all all {method}\nhostnossl all all all trust\n"
        )
        self.stop(signal.SIGINT)
        self._port = port
        self.start()
        return f"postgresql://keepwarm@localhost:{port}/{name}"

    def require_passwords(self, user: str) -> None:
        """The server is started again, and this user has to have a password."""
        (self._data / "pg_hba.conf").write_text(
            f"local all {user} scram-sha-256\nlocal all all trust\n"
        )
        self.stop(signal.SIGINT)
        self.start()

    @contextmanager
    def pooled(self) -> Iterator[str]:
        """A PgBouncer in front of it that gives a connection for one transaction at a time: its
        directory and port, as the query of a URL.
        """
        if not _PGBOUNCER.exists():
            raise FileNotFoundError(str(_PGBOUNCER))
        settings = self._directory / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={self._directory} user=keepwarm\n"
            "[pgbouncer]\nauth_type = any\npool_mode = transaction\n"
            # Two, so that a client gets now one, now the other.
            f"default_pool_size = 2\nunix_socket_dir = {self._directory}\n"
            f"listen_addr =\nlisten_port = {_POOL_PORT}\n",
            encoding="utf-8",
        )
        settings.chmod(0o644)
        with self._log.open("ab") as log:
            pool = subprocess.Popen(
                [*self._become, str(_PGBOUNCER), str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
            )
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not (self._directory / f".s.PGSQL.{_POOL_PORT}").exists():
                assert pool.poll() is None and time.monotonic() < deadline, self.log
                time.sleep(0.05)
            yield f"host={self._directory}&port={_POOL_PORT}"
        finally:
            # From 1.23 on, the end that SIGTERM asks for waits for all clients to leave.
            pool.kill()
            pool.wait(_PATIENCE_SECONDS)
            (self._directory / f".s.PGSQL.{_POOL_PORT}").unlink()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _is_ready(self) -> bool:
        asked = [str(self._programs / "pg_isready"), "-q", "-h", str(self._directory)]
        asked += ["-p", str(self._port)]
        return subprocess.run(asked, check=False).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._become, str(self._programs / program), *arguments],
            cwd=self._directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def _remove(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
