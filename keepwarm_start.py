"""Where each Python process of Keepwarm starts: the `keepwarm` command, and
`python -E -P keepwarm_start.py MODULE ARGUMENT…` for what it starts itself.

A user's directory may hold `services/`, `random.py` or `queue.py`. Such files must never be
imported in place of ours or of Python's. So the working directory is not searched for modules, and
what PYTHONPATH names is searched last: a cluster's environment modules can add packages there, and
nothing is replaced.

This module stands outside of `services`, which is a name that a user's package may have as well. It
imports as little as possible before the search path is in order.
"""

import os
import sys

SEARCHED_LAST = "KEEPWARM_PYTHONPATH"
"""The variable in which child processes find what PYTHONPATH named."""


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in a child process."""
    last = os.environ.get(SEARCHED_LAST)
    searched = ("-X", f"{SEARCHED_LAST}={last}") if last else ()
    python = (sys.executable, "-E", "-P", "-Xutf8", *searched)
    return [*python, os.path.abspath(__file__), module, *arguments]


def isolate() -> None:
    """Put this process's search path in order, and the environment that its children inherit."""
    here = _working_directory()
    told = sys._xoptions.get(SEARCHED_LAST)  # where the environment is a command's own
    paths = [os.environ.pop(name, "") for name in ("PYTHONPATH", SEARCHED_LAST)]
    named = [
        os.path.normpath(os.path.join(here, entry))
        for path in (*paths, told if isinstance(told, str) else "")
        if path
        for entry in path.split(os.pathsep)  # an empty entry means the working directory
    ]
    last = [entry for entry in named if entry != here]
    # Python begins with the directory of the script, or with the working directory.
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
