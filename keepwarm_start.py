"""Where each Python process of Keepwarm starts: the `keepwarm` command, and
`python -E -P keepwarm_start.py MODULE ARGUMENT…` for what it starts itself.

A user's directory may have `services/`, `random.py` or `queue.py`, which must never replace modules
of Keepwarm or of Python. So the working directory is not on the search path, and the entries of
PYTHONPATH come last: a cluster's environment modules can add packages, but replace none.

This module is outside of `services`, because a user's package may have that name. It imports as
little as possible before the search path is set.
"""

import os
import sys

SEARCHED_LAST = "KEEPWARM_PYTHONPATH"
"""The variable that passes the entries of PYTHONPATH to child processes."""


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of Keepwarm in a child process."""
    last = os.environ.get(SEARCHED_LAST)
    searched = ("-X", f"{SEARCHED_LAST}={last}") if last else ()
    python = (sys.executable, "-E", "-P", "-Xutf8", *searched)
    return [*python, os.path.abspath(__file__), module, *arguments]


def isolate() -> None:
    """Set the search path of this process, and the environment that its children inherit."""
    here = _working_directory()
    option = sys._xoptions.get(SEARCHED_LAST)  # for children with an environment of their own
    paths = [os.environ.pop(name, "") for name in ("PYTHONPATH", SEARCHED_LAST)]
    named = [
        os.path.normpath(os.path.join(here, entry))
        for path in (*paths, option if isinstance(option, str) else "")
        if path
        for entry in path.split(os.pathsep)  # an empty entry means the working directory
    ]
    last = [entry for entry in named if entry != here]
    # The first entry is the directory of the script, or the working directory.
    safe = getattr(sys.flags, "safe_path", False)  # an engine's Python may be older than 3.11
    found = sys.path if safe else sys.path[1:]
    ours = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = dict.fromkeys([*(e for e in found if e not in named), ours, *last])
    os.environ["PYTHONSAFEPATH"] = "1"  # for interpreters that children start
    if last:
        os.environ[SEARCHED_LAST] = os.pathsep.join(last)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return "/"


def main() -> None:
    """The `keepwarm` command."""
    if sys.getfilesystemencoding() != "utf-8":
        # SQLite takes paths in UTF-8, whatever the locale says, and files are written in UTF-8.
        os.execv(sys.executable, [sys.executable, "-Xutf8", *sys.orig_argv[1:]])  # noqa: S606
    isolate()
    from services.cli.main import main as keepwarm

    keepwarm()


if __name__ == "__main__":
    isolate()
    import runpy

    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
