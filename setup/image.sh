#!/bin/sh
# Installs Keepwarm into an image; the %post section of worker.def and of control.def.
#   apptainer/install.sh "LOCK..." "DEBIAN PACKAGE..."
# LOCK is a file of setup/requirements. The definition file has put what this needs beside it.
set -eu
here=/opt/keepwarm
locks=$1
packages=$2

export DEBIAN_FRONTEND=noninteractive
apt-get update
# shellcheck disable=SC2086 # a list of packages
apt-get install -y --no-install-recommends ca-certificates python3 python3-venv $packages
apt-get clean
rm -rf /var/lib/apt/lists/*

python3 -m venv "$here/venv"
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
for lock in $locks; do
    # The locks are complete, and the engines' own lists are not to be followed.
    "$here/venv/bin/pip" install --quiet --no-deps -r "$here/setup/requirements/$lock"
done
"$here/venv/bin/pip" install --quiet --no-deps "$here"

# The tests' tools are in the lock as well. What an engine needs of them stays.
tools=$("$here/venv/bin/python" - "$here/setup/requirements" "$locks" <<'PYTHON'
import re, sys, tomllib
from pathlib import Path

requirements, locks = Path(sys.argv[1]), sys.argv[2].split()
engines = "".join((requirements / lock).read_text() for lock in locks if lock.startswith("engine-"))
needed = set(re.findall(r"^([a-z0-9-]+)==", engines, re.MULTILINE))
project = tomllib.loads(Path("/opt/keepwarm/pyproject.toml").read_text())["project"]
dev = project["optional-dependencies"]["dev"]
tools = {re.split(r"[<>=\[ ]", line)[0].lower() for line in dev}
print(*sorted(tools - needed))
PYTHON
)
# shellcheck disable=SC2086 # a list of packages
[ -z "$tools" ] || "$here/venv/bin/pip" uninstall --quiet --yes $tools

ln -sf "$here/venv/bin/keepwarm" /usr/local/bin/keepwarm
# What is installed now need not be there twice.
rm -rf "$here/services" "$here/build" "$here"/*.egg-info
