#!/bin/sh
# Puts Keepwarm into an image, in steps that a builder can cache. The Dockerfile and apptainer/*.def use it.
#   setup/image.sh packages NAME...      Debian's packages
#   setup/image.sh locks LOCK...         a virtual environment with what setup/requirements/LOCK names
#   setup/image.sh keepwarm EXTRA...     Keepwarm into it; what it does not need of all that goes
#   setup/image.sh sbom                  the list of what is in the image, /opt/keepwarm/sbom.cdx.json
#   setup/image.sh places DIRECTORY...   directories for whoever the container runs as, like /tmp
# The definition of the image has put what this needs below /opt/keepwarm.
set -eu
here=/opt/keepwarm
pip="$here/venv/bin/pip"
step=$1
shift
export DEBIAN_FRONTEND=noninteractive
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

case $step in
packages)
    apt-get update
    apt-get install -y --no-install-recommends "$@"
    apt-get clean
    rm -rf /var/lib/apt/lists/*
    ;;
locks)
    [ -x "$pip" ] || python3 -m venv "$here/venv"
    # The locks are complete, and the engines' own lists are not to be followed.
    install() { "$pip" install --quiet --no-deps "$@"; }
    for lock in "$@"; do
        file=$here/setup/requirements/$lock
        if [ "$lock" != engine-cpu.lock ]; then
            install -r "$file"
            continue
        fi
        torch=$(grep '^torch==' "${file%.lock}.in")
        install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch"
        install -r "$file"
        # A CUDA build of torch, where pip finds no other, needs libraries that the lock leaves out.
        "$pip" install --quiet "$torch"
    done
    ;;
keepwarm)
    "$pip" install --quiet --no-deps "$here"
    # The tests' tools, pip itself, and what other services need.
    unneeded=$("$here/venv/bin/python" "$here/setup/unneeded.py" "$here/setup/requirements" "$@")
    # shellcheck disable=SC2086 # a list of packages
    "$pip" uninstall --quiet --yes $unneeded
    ln -sf "$here/venv/bin/keepwarm" /usr/local/bin/keepwarm
    # What is installed now need not be there twice.
    rm -rf "$here/services" "$here/keepwarm_start.py" "$here/build" "$here"/*.egg-info
    ;;
sbom)
    python3 -I "$here/setup/sbom.py" "$here/venv" >"$here/sbom.cdx.json"
    ;;
places)
    mkdir -p "$@"
    chmod 1777 "$@"
    ;;
*)
    echo "image.sh: no such step: $step" >&2
    exit 2
    ;;
esac
