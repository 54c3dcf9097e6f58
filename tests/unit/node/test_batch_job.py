from pathlib import Path

import pytest

from services.node.batch_job import job_id


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "4711"}, "4711"),
        ({"SLURM_JOB_ID": "4713", "SLURM_ARRAY_JOB_ID": "4711"}, "4713"),
        (
            {"SLURM_JOB_ID": "4713", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"},
            "4711_2",
        ),
        ({"SLURM_JOB_ID": ""}, None),
        ({"SLURM_JOB_ID": "47 11\n"}, None),
        ({"SLURM_JOB_ID": "4" * 65}, None),
        ({"_CONDOR_JOB_AD": "/nowhere/.job.ad"}, None),
    ],
)
def test_a_job_is_called_as_its_scheduler_does(
    environment: dict[str, str], job: str | None
) -> None:
    assert job_id(environment) == job


@pytest.mark.parametrize(
    ("text", "job"),
    [
        ('Owner = "me"\nClusterId = 12\nProcId = 0\n', "12.0"),
        ("procid=3\r\nclusterid = 12\r\n", "12.3"),
        ('Args = "ClusterId = 9"\nMyClusterId = 8\n', None),
        ("", None),
        ("\xff\x00", None),
    ],
)
def test_a_job_of_htcondor_is_read_from_its_advertisement(
    text: str, job: str | None, tmp_path: Path
) -> None:
    advertisement = tmp_path / ".job.ad"
    advertisement.write_text(text, encoding="latin-1", newline="")
    assert job_id({"_CONDOR_JOB_AD": str(advertisement)}) == job
