"""What apptainer/job.sh makes of Slurm's answers, and of a controller that gives none."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
DISABLED = "Requested operation is presently disabled for job 7"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose worker drains at once. What squeue says of its state, and what
    scontrol says, is in files: a line for each time that it is asked, the last one for ever. A line
    that begins with `!` is an error.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = (
        'line=$(head -n 1 "$file"); [ "$(wc -l <"$file")" -eq 1 ] || sed -i 1d "$file"\n'
        'case $line in !*) echo "${line#!}" >&2; exit 1 ;; esac\necho "$line"\n'
    )
    for name, text in {
        "keepwarm": "exit 0",
        "sleep": "exit 0",
        "squeue": f'case "$*" in *%e*) exit 0 ;; esac\nfile={tmp_path}/squeue\n{answers}',
        "scontrol": f'echo "$*" >>{tmp_path}/calls\nfile={tmp_path}/scontrol\n{answers}',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "KEEPWARM_RUNTIME_DIR": str(tmp_path),
        "KEEPWARM_CACHE_DIR": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("state", "requeued", "code", "says"),
    [
        (["RUNNING"], [""], 0, "drained; 7 is back in the queue"),
        ([f"!{SILENT}", f"!{SILENT}", "RUNNING"], [""], 0, "drained; 7 is back in the queue"),
        ([f"!{SILENT}"], [""], 0, "drained; 7 is back in the queue"),
        (["RUNNING"], [f"!{SILENT}", f"!{SILENT}", ""], 0, "drained; 7 is back in the queue"),
        (["RUNNING"], [f"!{SILENT}"], 75, f"drained; 7 could not be put back: {SILENT}"),
        (["RUNNING"], [f"!{DISABLED}"], 0, "7 was submitted with --no-requeue, and ends"),
        (["CANCELLED"], None, 0, "Slurm says that 7 is CANCELLED, so it is not put back"),
    ],
)
def test_a_drained_job_continues_unless_slurm_ends_it(
    job: dict[str, str],
    tmp_path: Path,
    state: list[str],
    requeued: list[str] | None,
    code: int,
    says: str,
) -> None:
    (tmp_path / "squeue").write_text("\n".join(state) + "\n")
    (tmp_path / "scontrol").write_text("\n".join(requeued or [""]) + "\n")
    done = subprocess.run(
        [REPOSITORY / "apptainer" / "job.sh"], env=job, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    calls = tmp_path / "calls"
    assert calls.exists() == (requeued is not None)
    if calls.exists():
        assert set(calls.read_text().splitlines()) == {"requeue 7"}


APPTAINER = """#!/bin/sh
printf '%s\\n' "$@"
echo "KEEPWARM_BROKER_URL=$KEEPWARM_BROKER_URL, clean: ${APPTAINER_CLEANENV-no}"
"""


def test_a_container_gets_the_settings_and_directories_of_any_name(
    job: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "squeue").write_text("CANCELLED\n")
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.write_text(APPTAINER)
    apptainer.chmod(0o755)
    odd, plain = tmp_path / "a:b, c", tmp_path / "plain"
    for place in (odd, plain):
        place.mkdir()
    variables = {
        "APPTAINER_CLEANENV": "1",
        "KEEPWARM_IMAGE": "worker.sif",
        "KEEPWARM_BROKER_URL": "amqps://u@host/v",
        "KEEPWARM_CACHE_DIR": str(odd),
        "TMPDIR": str(plain),
    }
    done = subprocess.run(
        [REPOSITORY / "apptainer" / "job.sh"],
        env={**job, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    mount = f'type=bind,"source={odd}","destination={odd}"'
    assert words[words.index("--mount") + 1] == mount
    assert ["--bind", str(plain)] == words[(at := words.index(str(plain)) - 1) : at + 2]
    assert words[-1] == "KEEPWARM_BROKER_URL=amqps://u@host/v, clean: no"
