#!/usr/bin/env bash
# Rewrites setup/requirements/*.lock. Keeps the versions that are there unless told otherwise:
#   setup/lock.sh [--upgrade | --upgrade-package NAME]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -qq uv==0.13.9

# Annotations and index addresses are left out: they name the machine that wrote the lock.
compile() {
    "$scratch/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-annotate \
        --no-emit-index-url --custom-compile-command 'make lock' "$@" >/dev/null
}

cd setup/requirements
compile "$@" ../../pyproject.toml --extra producer --extra gpu-worker --extra collector --extra dev \
    --constraints services.constraints --generate-hashes --output-file services.lock
# Without torch, which is installed by its line in engine-cpu.in: which file is torch 2.13.0 (a CPU or a
# CUDA build) depends on where pip looks, so it has no one hash.
compile "$@" engine-cpu.in --constraints services.lock --overrides engine-cpu.overrides \
    --excludes engine-cpu.excludes --no-emit-package torch --generate-hashes \
    --output-file engine-cpu.lock
compile "$@" engine-cuda.in --constraints services.lock --generate-hashes \
    --output-file engine-cuda.lock
