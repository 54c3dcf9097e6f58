"""A bare Debian or Ubuntu in a directory, for tests of images and of other releases: debootstrap,
as root.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_DEBOOTSTRAP = Path("/usr/share/debootstrap")
# A Debian does not have the key of Ubuntu's archive, "Ubuntu Archive Automatic Signing Key (2018)".
# Its fingerprint is F6EC B376 2474 EDA9 D21B  7022 8719 20D1 991B C93C.
_UBUNTU_KEY = Path(__file__).with_name("ubuntu-archive-2018.gpg")
_UBUNTU = ("jammy", "noble")

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
    """A Debian or Ubuntu with nothing but what every one has."""
    assert os.geteuid() == 0, "chroot and debootstrap are root's"
    options = ["--variant=minbase", "--include=ca-certificates"]
    if release in _UBUNTU:  # rabbitmq-server and others are in universe
        options += ["--components=main,universe", f"--keyring={_UBUNTU_KEY}"]
    with tempfile.TemporaryDirectory() as scripts:
        # The script of all Ubuntus is the one of the first; an older debootstrap has not all names.
        shutil.copytree(_DEBOOTSTRAP, scripts, symlinks=True, dirs_exist_ok=True)
        if release in _UBUNTU and not Path(scripts, "scripts", release).exists():
            Path(scripts, "scripts", release).symlink_to("gutsy")
        done = subprocess.run(
            ["debootstrap", *options, release, root],
            env=os.environ | {"DEBOOTSTRAP_DIR": scripts},
            capture_output=True,
            text=True,
            check=False,
        )
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
