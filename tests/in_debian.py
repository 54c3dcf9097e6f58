"""Run a command on a copy of this checkout in another release of Debian or Ubuntu, as root:

    python3 -m tests.in_debian trixie make test

The release is in .debian/RELEASE: debootstrap makes it at first, and what a command installs there
stays, as in .venv. ARGS, TESTS and ENGINE go along. Only Python's own library is needed here.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.debian import give_network, make_root, network_variables, remove_root

_REPOSITORY = Path(__file__).resolve().parent.parent
# Published claims and collected inputs, which some tests want where they are beside the checkout.
_SHARED = ("shared/data", "shared/field")
_CHECKOUT = "src/keepwarm"
_KEPT = (".venv", ".models")
_PASSED_ON = ("ARGS", "ENGINE", "TESTS")
# Mounts that nobody else sees, and processes that end with it, whatever ends it: nothing is left.
# pivot_root and not chroot alone: containers that are started there need a root that is a mount.
# The shell stays: as process 1 it waits for orphans, which are zombies otherwise.
_IN_ROOT = """
set -e
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --rbind /sys "$1/sys"
mount -t tmpfs tmpfs "$1/run"
cd "$1"
pivot_root . .
umount --lazy .
exec chroot . /bin/sh -c 'cd "$0"; "$@"; exit $?' "/$2" "${@:3}"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("release", help="as debootstrap knows it: bookworm, trixie, noble")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("Only root can make another Debian and enter it: run this as root.", file=sys.stderr)
        return 2
    root = _REPOSITORY / ".debian" / arguments.release
    root.parent.mkdir(exist_ok=True)
    with Path(f"{root}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_ready(root, arguments.release)
        _copy_checkout(root / _CHECKOUT)
        return _run(root, arguments.command)


def _make_ready(root: Path, release: str) -> None:
    if not root.is_dir():
        print(f"{release}: making it with debootstrap in {root}", flush=True)
        unfinished = Path(f"{root}.unfinished")
        remove_root(unfinished)
        make_root(unfinished, release)
        unfinished.rename(root)
    give_network(root)
    (root / _CHECKOUT).mkdir(parents=True, exist_ok=True)
    if not (root / "usr/bin/make").exists():
        packages = "apt-get -qq update && apt-get -qq install --no-install-recommends make python3"
        done = _run(root, ["sh", "-c", f"{packages} >/var/log/make.log 2>&1"])
        assert done == 0, (root / "var/log/make.log").read_text()[-2000:]


def _copy_checkout(target: Path) -> None:
    """What git knows of, or would add; what was installed there before is kept."""
    for old in target.iterdir():
        if old.name not in _KEPT:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    list_files = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    list_files += ["--cached", "--others", "--exclude-standard"]
    files = subprocess.run(list_files, cwd=_REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(files).split("\0")):
        if (_REPOSITORY / name).exists():  # not removed and still in the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_REPOSITORY / name, target / name)
    for part in _SHARED:
        if (_REPOSITORY.parent / part).is_dir():
            shutil.copytree(_REPOSITORY.parent / part, target.parent / part, dirs_exist_ok=True)


def _run(root: Path, command: list[str]) -> int:
    # The kernel ends it with us, and with it all that it started.
    alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
    alone += ["--pid", "--fork", "--kill-child"]
    shell = ["bash", "-c", _IN_ROOT, "in_debian", root, _CHECKOUT, *command]
    environment = {
        **network_variables(),
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "DEBIAN_FRONTEND": "noninteractive",
    }
    return subprocess.run([*alone, *shell], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
