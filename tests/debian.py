"""A bare Debian in a directory, for tests of images and of other releases: debootstrap, as root."""

import os
import shutil
import subprocess
from pathlib import Path

# What this machine reaches the network with, so that apt and pip do from the root as well.
_NETWORK_FILES = ("etc/ssl/certs/ca-certificates.crt", "etc/resolv.conf", "etc/hosts")
_NETWORK_VARIABLES = (
    "PIP_CERT",
    "PIP_INDEX_URL",
    "PIP_FIND_LINKS",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


def make_root(root: Path, release: str = "bookworm") -> None:
    """A Debian with nothing but what every Debian has."""
    assert os.geteuid() == 0, "chroot and debootstrap are root's"
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", release, root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def remove_root(root: Path) -> None:
    # Nothing may be mounted in it: then removing it would remove what is mounted.
    assert str(root) not in Path("/proc/self/mounts").read_text()
    shutil.rmtree(root, ignore_errors=True)


def network_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in _NETWORK_VARIABLES if name in os.environ}


def give_network(root: Path) -> None:
    for name in _NETWORK_FILES:
        shutil.copy2(Path("/", name), root / name)
    own = Path("/usr/local/share/ca-certificates")
    if own.is_dir():
        shutil.copytree(own, root / own.relative_to("/"), dirs_exist_ok=True)
    # A directory of wheels may hold a build of torch that an index has not.
    wheels = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere"))
    if wheels.is_dir():
        shutil.copytree(wheels, root / wheels.relative_to("/"), dirs_exist_ok=True)
