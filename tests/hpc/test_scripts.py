"""Every shell script passes shellcheck, also those within other files."""

import re
import subprocess
from pathlib import Path

import pytest

from services.contracts import load_settings
from tests.conftest import REPOSITORY
from tests.hpc.definitions import APPTAINER, read_definition

SCRIPTS = sorted(
    [
        *(REPOSITORY / "setup").glob("*.sh"),
        REPOSITORY / ".ci" / "run",
        *APPTAINER.rglob("*.sh"),
        *APPTAINER.rglob("*.sbatch"),
        *(REPOSITORY / "tests" / "compose").rglob("*.sh"),
    ]
)
DEFINITIONS = sorted(APPTAINER.glob("*.def"))
SHELL_SECTIONS = ("post", "environment", "runscript", "test")


def shellcheck(*arguments: str, script: str | None = None) -> None:
    done = subprocess.run(
        ["shellcheck", *arguments], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_script_passes_shellcheck(script: Path) -> None:
    shellcheck(str(script))


@pytest.mark.parametrize("section", SHELL_SECTIONS)
@pytest.mark.parametrize("file", DEFINITIONS, ids=lambda path: path.name)
def test_a_section_of_a_definition_passes_shellcheck(file: Path, section: str) -> None:
    shellcheck("--shell=sh", "-", script=read_definition(file).sections[section])


@pytest.mark.parametrize("file", DEFINITIONS, ids=lambda path: path.name)
def test_a_definition_is_whole(file: Path) -> None:
    definition = read_definition(file)
    assert definition.header["Bootstrap"] == "docker"
    assert re.fullmatch(r"debian@sha256:[0-9a-f]{64}", definition.header["From"])
    assert {"files", "labels", "help", *SHELL_SECTIONS} == definition.sections.keys()
    for source, target in definition.files:
        assert source.exists(), source
        assert target.startswith("/opt/keepwarm/")
    # What it calls in the image has been put there.
    sections = "".join(definition.sections.values())
    called = set(re.findall(r"/opt/keepwarm/(?:apptainer|setup)/[\w.]+", sections))
    assert called <= {target for _, target in definition.files}


@pytest.mark.parametrize("section", ["post", "test"])
@pytest.mark.parametrize("file", DEFINITIONS, ids=lambda path: path.name)
def test_a_command_that_fails_in_the_midst_fails_the_section(
    file: Path, section: str, tmp_path: Path
) -> None:
    """Apptainer's shell for %test goes on after an error, and the last command's status counts."""
    script = read_definition(file).sections[section]
    for name in ("sh", "keepwarm"):
        program = tmp_path / name
        program.write_text("#!/bin/false\n")
        program.chmod(0o755)
    ends = subprocess.run(
        ["/bin/sh", "-c", f"{script}\necho went on"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ends.returncode != 0 and "went on" not in ends.stdout, ends


def test_the_job_scripts_name_the_path_of_job_sh() -> None:
    """Slurm runs a copy that is elsewhere; an image has it in a place of its own."""
    worker = read_definition(APPTAINER / "worker.def")
    assert (APPTAINER / "job.sh", "/opt/keepwarm/apptainer/job.sh") in worker.files
    assert "/opt/keepwarm/apptainer/job.sh" in (APPTAINER / "job.sh").read_text()
    submitted = (APPTAINER / "htcondor" / "worker.sub").read_text()
    assert re.search(r"^executable +=\s*apptainer/job\.sh$", submitted, re.MULTILINE)


def submit_commands(**macros: str) -> dict[str, str]:
    """What worker.sub says, with its macros in place, as far as HTCondor's own reading goes."""
    lines = (APPTAINER / "htcondor" / "worker.sub").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    commands = {name.strip(): value.strip() for name, _, value in pairs} | macros

    def placed(value: str) -> str:
        value = re.sub(r"\$Fnx\((\w+)\)", lambda m: Path(commands[m[1]]).name, value)
        value = re.sub(r"\$ENV\((\w+)\)", lambda m: "amqps://u@host/v", value)
        return re.sub(r"\$\((image|model|workers|\w+_file)\)", lambda m: commands[m[1]], value)

    return {name: placed(value) for name, value in commands.items()}


@pytest.mark.parametrize("ca_file", ["", "secrets/ca.pem"])
def test_the_files_that_an_htcondor_job_names_are_transferred_with_it(ca_file: str) -> None:
    macros = {"ca_file": ca_file} if ca_file else {}
    commands = submit_commands(**macros)
    pairs = (word.partition("=") for word in commands["environment"].strip('"').split())
    variables = {name: value for name, _, value in pairs}
    travels = {Path(name).name for name in commands["transfer_input_files"].split(",") if name}
    told = {value for name, value in variables.items() if name.endswith("_FILE") and value}
    assert told == travels and "worker.password" in told
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert load_settings().broker_ca_file == (Path("ca.pem").absolute() if ca_file else None)
