"""The process of a command: its streams where the locale is not UTF-8 or the terminal is lost, and
modules that are left out of its imports.
"""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli.process import without
from services.contracts import load_settings
from services.store import Store

SAYS = r"""
import sys
from services.cli.process import make_streams_robust
make_streams_robust()
for stream in (sys.stdout, sys.stderr):
    print("done \u2026 \udcff", file=stream)
"""
GOES_ON = """
import os, sys
from pathlib import Path
from services.cli.process import make_streams_robust
make_streams_robust()
print("ready")
sys.stdin.readline()
print("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text("results")
"""
LATIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def test_pipes_get_utf_8_whatever_the_locale(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAYS],
        env={**os.environ, **LATIN},
        cwd=repository,
        capture_output=True,
        check=True,
    )
    assert done.stdout == done.stderr == "done \u2026 \\udcff\n".encode()


@pytest.mark.parametrize("encoding", ["iso8859-1", "ANSI_X3.4-1968", "utf-8"])
def test_a_terminal_gets_escapes_for_what_its_encoding_lacks(
    encoding: str, repository: Path
) -> None:
    ours, its = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", f"import locale; locale.getencoding = lambda: {encoding!r}\n{SAYS}"],
        cwd=repository,
        stdout=its,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(its)
    shown = os.read(ours, 100)
    os.close(ours)
    assert done.returncode == 0, done.stderr
    dots = b"\\u2026" if encoding == "iso8859-1" else "\u2026".encode()
    assert shown == b"done " + dots + b" \\udcff\r\n"


def test_who_writes_to_a_lost_terminal_goes_on(repository: Path, tmp_path: Path) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", GOES_ON, str(tmp_path / "out")],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    assert os.read(ours, 100) == b"ready\r\n"
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "out").read_text() == "results"


def test_the_command_works_in_utf_8_whatever_the_locale(repository: Path, tmp_path: Path) -> None:
    """Else SQLite would look for its file in a directory of another name."""
    place = tmp_path / "caf\u00e9"
    place.mkdir()
    Store.open(load_settings(store_url=str(place / "store.sqlite"))).close()
    script = tmp_path / "keepwarm"
    script.write_text("from keepwarm_start import main\nmain()\n")
    arguments = (script, "status", "--store", place / "store.sqlite")
    done = subprocess.run(
        [os.fsencode(argument) for argument in (sys.executable, *arguments)],
        env={**os.environ, **LATIN},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["status", "--json"]])
def test_a_reader_that_closes_the_pipe_ends_the_command_as_sigpipe_would(
    arguments: list[str], repository: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.sqlite"
    Store.open(load_settings(store_url=str(store))).close()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from keepwarm_start import main; main()", *arguments],
        env={**os.environ, "KEEPWARM_STORE_URL": str(store)},
        cwd=repository,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_store_whose_path_is_in_no_utf_8_is_refused(
    keepwarm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("status", "--store", "caf\udce9/store.sqlite") == 2
    assert r"path caf\udce9/store.sqlite is not valid UTF-8" in capsys.readouterr().err


def test_what_is_left_out_is_as_if_not_installed_and_comes_back() -> None:
    import email
    import email.message

    with without("email", "pstats"):
        with pytest.raises(ModuleNotFoundError):
            import pstats
        with pytest.raises(ModuleNotFoundError):
            import email.message
    import pstats

    assert (sys.modules["email"], sys.modules["email.message"]) == (email, email.message)
    assert sys.modules["pstats"] is pstats


def test_it_comes_back_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), without("email"):
        raise ZeroDivisionError
    import email.policy  # noqa: F401
