"""The user's name and home directory, which libraries ask for."""

import os
import pwd
from pathlib import Path

from services.contracts.settings import private_tmp


def name_the_user() -> None:
    """Where the user has no line in passwd, as in a container that was started with `--user 12345`:
    torch asks for the name (getpass(3)) and Hugging Face's hub for the home directory.

    Raises UsageError where the substitute for the home directory is another user's.
    """
    try:
        Path.home()
    except RuntimeError:
        from services.node.runtime_dir import open_private_dir

        os.environ["HOME"] = str(open_private_dir(private_tmp(), "HOME"))
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"uid-{os.geteuid()}")
