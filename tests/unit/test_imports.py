"""What is left out of a worker's start."""

import subprocess
import sys

import pytest

from services.imports import without


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


def test_a_worker_imports_nothing_for_terminals_and_nothing_of_an_engine() -> None:
    code = (
        "import sys; sys.argv = ['keepwarm', 'worker']; import services.cli.main;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "structlog" in imported and "httpx" in imported
    assert not imported & {"rich", "click", "torch", "vllm", "transformers", "huggingface_hub"}
