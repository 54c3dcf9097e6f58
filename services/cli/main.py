"""The command's front door: verbs, and what every one of them does with an error."""

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
    # An early warning of the scheduler's would end a process that does not listen yet. It waits
    # until `on_stop_signal` does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP})

import typer

from services.cli.imports import without
from services.cli.shown import shown
from services.cli.streams import make_robust
from services.cli.user import name_the_user
from services.contracts import KeepwarmError
from services.contracts.errors import UsageError

gc.disable()  # nothing that is imported is garbage, and to look for it takes a tenth of the time
with without("rich"):
    import structlog  # noqa: F401  (its tracebacks for terminals take a tenth of the time, too)

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
        "[bold]keepwarm run FILE[/bold] does it all on one machine; [bold]validate FILE[/bold] "
        "says before what it would read. The other verbs are its parts: "
        "[bold]submit[/bold] publishes claims, [bold]worker[/bold] answers them, "
        "[bold]collect[/bold] stores the verdicts; [bold]status[/bold], [bold]report[/bold] and "
        "[bold]export[/bold] read the store. [bold]contexts[/bold] shows and prepares what is warm "
        "on this node; [bold]broker setup[/bold] prepares a broker; [bold]doctor[/bold] says what "
        "is wrong with a machine.\n\n"
        "Settings come from KEEPWARM_… variables (docs/settings.md); flags win. Exit codes: "
        "0 well, 1 a bug, 2 a bad flag or setting, 3 a bad file of claims or prompt, 4 no engine, "
        "5 no broker, 6 no store or output, 7 some claims have no outcome yet, 8 the model hardly "
        "ever says a label word, 9 a message is of a newer Keepwarm; [bold]run[/bold] "
        "ends with 130 or 143 when Ctrl-C or SIGTERM stopped it half-way."
    ),
)

_broker = typer.Typer(no_args_is_help=True, help="Prepare a broker for a team.")
app.add_typer(_broker, name="broker")
_dead = typer.Typer(
    no_args_is_help=True,
    help="Claims that were given up on, and messages that nobody could use.",
)
app.add_typer(_dead, name="dead")
_contexts = typer.Typer(
    no_args_is_help=True, help="What is warm on this node: engines, kept while workers come and go."
)
app.add_typer(_contexts, name="contexts")
_GROUPS = {"": app, "broker": _broker, "contexts": _contexts, "dead": _dead}


def _verb(name: str) -> Callable[..., None]:
    """The function behind a verb. A machine has the extras that it needs, and not all of them."""
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
                "the extra of the service that it belongs to, for example keepwarm[collector]"
            )

        unavailable.__doc__ = f"Not installed here: needs {missing}."
        return unavailable
    function: Callable[..., None] = getattr(module, words[-1])
    return function


def _wanted(arguments: Sequence[str]) -> Sequence[str]:
    """The verb that a command line asks for, or all of them: importing takes time, and a worker has
    to be at work within a second.
    """
    line = " ".join(arguments) + " "
    return [name for name in _VERBS if line.startswith(f"{name} ")] or _VERBS


def _flowing(text: str) -> str:
    """Its paragraphs without line breaks of their own: a terminal has another width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _name in _wanted(sys.argv[1:]):
    _function = _verb(_name)
    # What is not installed knows no flags, and takes any to say so.
    _any = {"ignore_unknown_options": True, "allow_extra_args": True}
    _group, _, _last = _name.rpartition(" ")
    _GROUPS[_group].command(
        _last,
        help=_flowing(_function.__doc__ or ""),
        context_settings=_any if _function.__name__ == "unavailable" else None,
    )(_function)
gc.freeze()  # nor is it looked at later
gc.enable()


def _with_home(argument: str) -> str:
    """`--store=~/x` as a shell gives `--store ~/x`: it expands no `~` in the midst of a word."""
    flag, equals, value = argument.partition("=")
    if flag.startswith("--") and equals and value.startswith("~"):
        return f"{flag}={os.path.expanduser(value)}"  # noqa: PTH111  (the rest stays as it is)
    return argument


def _show_version(wanted: bool) -> None:
    if wanted:
        print(shown(f"keepwarm {importlib.metadata.version('keepwarm')}"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """What comes before a verb."""


def main() -> None:
    make_robust()
    sys.argv[1:] = [_with_home(argument) for argument in sys.argv[1:]]
    name_the_user()
    try:
        app()
    except KeepwarmError as error:
        print(shown(f"keepwarm: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
