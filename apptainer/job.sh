#!/usr/bin/env bash
# One worker as a batch job: directories for as long as the job lasts, signals passed on, and the end
# that the scheduler understands. docs/hpc.md says why each of it is so.
#   apptainer/job.sh [ARGUMENT OF keepwarm worker]...
# KEEPWARM_IMAGE    an Apptainer image, in which this very script then runs once more
# KEEPWARM_COMMAND  without an image: how keepwarm is called, as words; else `keepwarm`
set -euo pipefail

say() { echo "job: $*" >&2; }

# A signal may come before there is a worker, before it listens, and more than once. It is passed on as
# SIGUSR1, which drains like SIGTERM and may come as often as it likes: Slurm sends its SIGTERM to every
# process of a job, so the worker has that one already, and a second one would end it on the spot.
asked=no again=no worker='' asking=''
pass_on() {
    asked=yes again=yes
    [[ -n $worker && -z $asking ]] || return 0
    while kill -USR1 "$worker" 2>/dev/null; do sleep 1; done &
    asking=$!
}
trap pass_on TERM INT USR1 USR2

# The node's own disk, not the home that all nodes share.
scratch=${SLURM_TMPDIR:-${_CONDOR_SCRATCH_DIR:-${TMPDIR:-/tmp}}}
export KEEPWARM_CACHE_DIR=${KEEPWARM_CACHE_DIR:-$scratch/keepwarm-cache-$UID}
if [[ -z ${KEEPWARM_RUNTIME_DIR-} ]]; then
    # A keeper lives no longer than its job, so another job's is of no use. mktemp makes it for us
    # alone. A socket's path has at most 107 bytes, and 35 of them are the socket's name.
    place=$scratch
    bytes=$(printf %s "$scratch/kw-XXXXXX" | wc -c)
    ((bytes <= 72)) || place=/tmp
    KEEPWARM_RUNTIME_DIR=$(mktemp -d "$place/kw-XXXXXX")
    export KEEPWARM_RUNTIME_DIR
    # A job that is put back gets its SIGTERM now, and so does every process of it: rm, too.
    trap 'trap "" TERM INT USR1 USR2; rm -rf "$KEEPWARM_RUNTIME_DIR"' EXIT
fi

# An array's first task has the array's own number: it must be called by both.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID-}}
job=${job:-${SLURM_JOB_ID-}}
in_slurm() { [[ -n $job ]] && command -v scontrol >/dev/null; }
# Leaves the last line that squeue or scontrol printed in $answer. Slurm's controller may not answer for
# a moment, so they are asked again, for less time than Slurm waits from SIGTERM to SIGKILL.
ask_slurm() {
    local try
    for try in 1 2 3 4 5; do
        ((try == 1)) || sleep 2
        if answer=$("$@" 2>&1); then
            answer=${answer##*$'\n'}
            return 0
        fi
        case $answer in *ontact*controller* | *"imed out"* | *onnect* | *"Zero Bytes"*) ;; *) return 1 ;; esac
    done
    return 1
}
if in_slurm && [[ -z ${KEEPWARM_WALLTIME_SECONDS-} ]]; then
    # Slurm 22.05 does not set SLURM_JOB_END_TIME; one that came with the submission is another job's.
    if ask_slurm squeue -h -j "$job" -o %e && end=$(date -d "$answer" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=$end
    fi
fi

if [[ -n ${KEEPWARM_IMAGE-} ]]; then
    # To bind what is not there is a fatal error.
    mkdir -p "$KEEPWARM_CACHE_DIR" ${HF_HOME:+"$HF_HOME"}
    binds=()
    for place in "$KEEPWARM_CACHE_DIR" "$KEEPWARM_RUNTIME_DIR" "$scratch" ${HF_HOME:+"$HF_HOME"}; do
        # --bind takes a colon or a comma for the end of a path. --mount, which older versions lack,
        # reads one line of CSV.
        case $place in
            *[:,]*) binds+=(--mount "type=bind,\"source=$place\",\"destination=$place\"") ;;
            *) binds+=(--bind "$place") ;;
        esac
    done
    # The worker's settings are in the environment; with these none would get into the container.
    unset APPTAINER_CLEANENV SINGULARITY_CLEANENV
    command=(
        "$(command -v apptainer || command -v singularity || echo apptainer)" exec --nv "${binds[@]}"
        # Apptainer passes signals on to this one process: not to the worker, which may have them already.
        "$KEEPWARM_IMAGE" env -u KEEPWARM_IMAGE -u KEEPWARM_COMMAND bash /opt/keepwarm/apptainer/job.sh
    )
else
    read -ra keepwarm <<<"${KEEPWARM_COMMAND:-keepwarm}"
    command=("${keepwarm[@]}" worker)
fi

say "on $(uname -n), scratch $scratch, restarts ${SLURM_RESTART_COUNT:-0}"
run_worker() {
    (
        # Worker and keeper listen all the same; their engines would end at a signal that all processes
        # get. A shell, which the image has for the same purpose, could not: there, the inner one does this.
        [[ -n ${KEEPWARM_IMAGE-} ]] || trap '' USR1 USR2
        exec "${command[@]}" "$@"
    ) &
    worker=$!
    [[ $asked == no ]] || pass_on
    while true; do
        again=no
        if wait "$worker"; then code=0; else code=$?; fi
        # A signal of ours ends `wait`, and not the worker.
        [[ $again == yes ]] || break
    done
}
run_worker "$@"
# A claim may end the worker's process: SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, or SIGKILL by the
# kernel's out-of-memory killer. The next worker in this directory finds the claim by what the dead one
# left there; in a job of its own it would not. A scheduler that kills ends this script as well.
crashes=0
while [[ -z ${KEEPWARM_IMAGE-} && $asked == no ]] && ((crashes < 10)); do
    case $code in 132 | 134 | 135 | 136 | 137 | 139) ;; *) break ;; esac
    crashes=$((crashes + 1))
    say "the worker crashed with $code; starting it again ($crashes of 10)"
    worker='' # so that a signal that comes now reaches the next one
    sleep 1
    run_worker "$@"
done
[[ -z $asking ]] || kill "$asking" 2>/dev/null || true
# The keeper is nobody's child, and not every scheduler finds it. It must not hold the GPU after us.
[[ -n ${KEEPWARM_IMAGE-} ]] || timeout 20 "${keepwarm[@]}" contexts evict --all >&2 || true
# It had not come so far as to listen to signals: nothing was begun.
if [[ $asked == yes ]] && ((code == 128 + 10 || code == 128 + 15)); then
    code=0
fi

# Drained, the worker ends with 0, and the job shall go on elsewhere or later: until `scancel`. Only
# while Slurm calls it running: else it was cancelled, or is being put back already. Where Slurm does not
# say, it is put back: Slurm refuses that for a job that was cancelled.
if ((code == 0)) && in_slurm; then
    state=unknown
    if ask_slurm squeue -h -j "$job" -o %T; then state=${answer:-gone}; else say "squeue: $answer"; fi
    case $state in
        RUNNING | unknown)
            if ask_slurm scontrol requeue "$job"; then
                say "drained; $job is back in the queue"
            elif [[ $answer == *disabled* ]]; then
                say "drained; $job was submitted with --no-requeue, and ends"
            else
                # Not 0: else Slurm would call it COMPLETED, and nobody would see that it did not go on.
                say "drained; $job could not be put back: $answer"
                say "submit it again, or call: scontrol requeue $job"
                code=75 # EX_TEMPFAIL of sysexits.h
            fi
            ;;
        *) say "drained; Slurm says that $job is $state, so it is not put back" ;;
    esac
else
    say "the worker ended with $code"
fi
exit "$code"
