"""A certificate authority of a test's own, made with openssl(1)."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_CONFIGURATION = """\
[ca]
default_ca = ours
[ours]
dir = {directory}
new_certs_dir = $dir
database = $dir/index.txt
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
[req]
distinguished_name = name
[name]
"""


@dataclass(frozen=True)
class Certificate:
    """PEM files."""

    file: Path
    key: Path


class Authority:
    """Signs certificates, with its own in `certificate`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory / name
        self._directory.mkdir()
        (self._directory / "index.txt").touch()
        self._settings = self._directory / "openssl.cnf"
        self._settings.write_text(_CONFIGURATION.format(directory=self._directory))
        self.certificate = self._files(name)
        self._run(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:TRUE"),
            *("-keyout", str(self.certificate.key), "-out", str(self.certificate.file)),
        )

    def sign(
        self, name: str, *, host: str = "DNS:localhost", years: tuple[int, int] | None = None
    ) -> Certificate:
        """A certificate with this common name for a host; valid now, or between two years."""
        files = self._files(name)
        request = self._directory / f"{name}.csr"
        self._run(
            *("req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={host}"),
            *("-keyout", str(files.key), "-out", str(request)),
        )
        ends = [f"{year}0101000000Z" for year in years or ()]
        self._run(
            *("ca", "-batch", "-notext", "-in", str(request), "-out", str(files.file)),
            *("-cert", str(self.certificate.file), "-keyfile", str(self.certificate.key)),
            *(("-startdate", ends[0], "-enddate", ends[1]) if ends else ("-days", "2")),
        )
        return files

    def _files(self, name: str) -> Certificate:
        return Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")

    def _run(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", command, "-config", str(self._settings), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
