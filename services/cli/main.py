"""The `keepwarm` command: its verbs, and how errors are reported."""

import keepwarm_start

if __name__ == "__main__":
    keepwarm_start.isolate()  # before any other import

import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

if sys.argv[1:2] in (["worker"], ["keeper"], ["collect"]):
    # A scheduler's early warning would end a process without a handler. It is blocked until
    # `on_stop_signal` installs one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP})

import typer

from services.cli.imports import without
from services.cli.printable import printable
from services.cli.streams import make_robust
from services.cli.user import name_the_user
from services.contracts import KeepwarmError
from services.contracts.errors import UsageError

gc.disable()  # imports create no garbage, and collecting takes a tenth of the time
with without("rich"):
    import structlog  # noqa: F401  (without rich it imports in a tenth less time)

_VERBS = (
    *("run", "validate", "submit", "worker", "collect", "status", "report", "export", "cancel"),
    *("contexts list", "contexts warm", "contexts evict", "contexts logs", "contexts prune"),
    "keeper",
    *("dead list", "dead show", "dead retry", "dead drop"),
    *("broker setup", "doctor"),
)

app = typer.Typer(
    name="keepwarm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Verify claims with language models on GPUs that come and go.\n\n"
        "[bold]keepwarm run FILE[/bold] verifies a file on one machine; "
        "[bold]validate FILE[/bold] checks the file first. On several machines, "
        "[bold]submit[/bold] publishes claims, [bold]worker[/bold] answers them, and "
        "[bold]collect[/bold] stores the verdicts. [bold]status[/bold], [bold]report[/bold] and "
        "[bold]export[/bold] read the store. [bold]contexts[/bold] lists, starts and stops the "
        "engines of this node. [bold]broker setup[/bold] prepares a broker. [bold]doctor[/bold] "
        "checks a machine and reports how to fix problems.\n\n"
        "Settings are KEEPWARM_… environment variables (docs/settings.md); flags override them. "
        "Exit codes: 0 success, 1 a bug, 2 a bad flag or setting, 3 a bad file of claims or "
        "prompt, 4 no engine, 5 no broker, 6 no store or output, 7 some claims have no outcome "
        "yet, 8 the model hardly ever answers with a label word, 9 a message from a newer "
        "Keepwarm; [bold]run[/bold] ends with 130 or 143 when Ctrl-C or SIGTERM interrupts it."
    ),
)

_broker = typer.Typer(no_args_is_help=True, help="Prepare a broker for a team.")
app.add_typer(_broker, name="broker")
_dead = typer.Typer(
    no_args_is_help=True,
    help="Dead claims, and messages that no service could use.",
)
app.add_typer(_dead, name="dead")
_contexts = typer.Typer(
    no_args_is_help=True, help="The engines of this node, which stay warm between workers and runs."
)
app.add_typer(_contexts, name="contexts")
_GROUPS = {"": app, "broker": _broker, "contexts": _contexts, "dead": _dead}


def _verb(name: str) -> Callable[..., None]:
    """The function of a verb. A machine may lack the extras of services that it does not run."""
    words = name.split()
    try:
        module = importlib.import_module(f"services.cli.{words[0]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("services"):
            raise
        missing = error.name

        def unavailable() -> None:
            raise UsageError(
                f"`keepwarm {name}` needs {missing}, which is not installed here; install "
                "the extra of its service, for example keepwarm[collector]"
            )

        unavailable.__doc__ = f"Not installed here: needs {missing}."
        return unavailable
    function: Callable[..., None] = getattr(module, words[-1])
    return function


def _verbs_to_import(arguments: Sequence[str]) -> Sequence[str]:
    """The verb of a command line, or all verbs when it has none. Imports take time, and a worker
    must start within a second.
    """
    line = " ".join(arguments) + " "
    return [name for name in _VERBS if line.startswith(f"{name} ")] or _VERBS


def _unwrapped(text: str) -> str:
    """The text without line breaks in its paragraphs; the terminal's width sets them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _name in _verbs_to_import(sys.argv[1:]):
    _function = _verb(_name)
    # A verb that is not installed accepts any flags, and reports that it is not installed.
    _any = {"ignore_unknown_options": True, "allow_extra_args": True}
    _group, _, _last = _name.rpartition(" ")
    _GROUPS[_group].command(
        _last,
        help=_unwrapped(_function.__doc__ or ""),
        context_settings=_any if _function.__name__ == "unavailable" else None,
    )(_function)
gc.freeze()  # nor are they searched later
gc.enable()


def _expand_home(argument: str) -> str:
    """Expand `~` in `--store=~/x`: a shell does so only at the start of an argument."""
    flag, equals, value = argument.partition("=")
    if flag.startswith("--") and equals and value.startswith("~"):
        return f"{flag}={os.path.expanduser(value)}"  # noqa: PTH111  (the rest stays as it is)
    return argument


def _show_version(wanted: bool) -> None:
    if wanted:
        print(printable(f"keepwarm {importlib.metadata.version('keepwarm')}"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    make_robust()
    sys.argv[1:] = [_expand_home(argument) for argument in sys.argv[1:]]
    name_the_user()
    try:
        app()
    except KeepwarmError as error:
        print(printable(f"keepwarm: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
