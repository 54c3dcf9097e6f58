"""Machines and accounts as people have them: no home directory, odd names, a `~` after `=`."""

import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

Keepwarm = Callable[..., int]


@pytest.fixture
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory and without a line in passwd."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        # Set first, so that what a command sets is taken away after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def no_line(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", no_line)


@pytest.mark.usefixtures("_nobody")
def test_a_user_without_name_and_home_has_both_for_libraries(
    keepwarm: Keepwarm, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("status", "--store", str(stored)) == 0
    home = Path(os.environ["HOME"])
    assert home == tmp_path / f"keepwarm-{os.geteuid()}"
    assert home.stat().st_mode & 0o077 == 0
    assert os.environ["LOGNAME"] == f"uid-{os.geteuid()}"


@pytest.mark.usefixtures("_nobody")
def test_a_user_without_a_home_directory_is_asked_for_a_store(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("cancel", "run-1") == 2
    assert "no home directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--store=~/{}", "--store=sqlite:///~/{}", "--store", "environment"]
)
def test_a_tilde_is_the_home_directory_wherever_it_is_given(
    flag: str,
    keepwarm: Keepwarm,
    stored: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(stored.parent))
    if flag == "environment":
        monkeypatch.setenv("KEEPWARM_STORE_URL", f"~/{stored.name}")
        assert keepwarm("status", "--json") == 0
    elif flag == "--store":
        assert keepwarm("status", "--json", "--store", f"~/{stored.name}") == 0
    else:
        assert keepwarm("status", "--json", flag.format(stored.name)) == 0
    assert "claims.jsonl" in capsys.readouterr().out


def test_a_flag_with_a_tilde_that_is_no_home_directory_is_left_as_it_is(
    keepwarm: Keepwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("status", "--store=~nobody-of-that-name/x") == 2
    assert "there is no such user" in capsys.readouterr().err
