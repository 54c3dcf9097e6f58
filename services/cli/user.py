"""A name and a home directory for users that have none; libraries need both."""

import os
import pwd
from pathlib import Path

from services.contracts.settings import private_tmp


def name_the_user() -> None:
    """Set LOGNAME and HOME when the user has no line in passwd, as in a container that was started
    with `--user 12345`. torch needs the name (getpass), Hugging Face's hub the home directory.

    Raises UsageError when another user owns the substitute for the home directory.
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
