"""What can be left out while something else is imported."""

import sys

import pytest

from services.cli.imports import without


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
