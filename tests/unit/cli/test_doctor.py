"""The `keepwarm doctor` command; tests/unit/doctor has the checks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli import doctor
from services.doctor import node_checks

Keepwarm = Callable[..., int]


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name]})


def test_each_check_has_a_line(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", sys.executable)
    monkeypatch.setattr(node_checks, "_ENGINE_VERSIONS", 'print(\'{"vllm": "1.2", "cuda": null}\')')
    assert keepwarm("doctor") == 0
    output = capsys.readouterr().out
    for name in doctor.CHECKS:
        assert name in output
    assert "vLLM 1.2" in output


def test_json_is_one_object_per_line(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "python")
    assert keepwarm("doctor", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["check"], found["level"]) == ("python", "ok")
    assert found["message"].startswith("Python 3")


def test_the_exit_code_is_that_of_the_first_error_and_all_checks_run(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", "/tmp/" + "long" * 30)
    monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", "/bin/false")
    assert keepwarm("doctor") == 2
    output = capsys.readouterr().out
    assert "name a shorter directory" in output
    assert "/bin/false cannot import vLLM: exit code 1" in output
    assert "store" in output
    Path("/tmp/" + "long" * 30).rmdir()


def test_a_check_whose_package_is_not_installed_is_a_warning(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "store")
    monkeypatch.setitem(sys.modules, "services.store.database", None)
    assert keepwarm("doctor") == 0
    assert "not checked: services.store.database is not installed here" in capsys.readouterr().out
