"""The `keepwarm` command: its verbs, and how errors are reported."""

import keepwarm_start

if __name__ == "__main__":
    keepwarm_start.isolate()  # before any other import

import gc
import importlib.metadata
import os
import signal
import sys
from typing import Annotated, Any

if sys.argv[1:2] in (["worker"], ["keeper"], ["collect"]):
    # A scheduler's early warning would end a process without a handler. It is blocked until
    # `on_stop_signal` installs one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP})

gc.disable()  # imports create no garbage, and collecting takes a tenth of the time
import typer
from typer.core import TyperCommand, TyperGroup

from services.cli.printable import printable
from services.cli.process import make_streams_robust, name_the_user, without
from services.contracts import KeepwarmError
from services.contracts.errors import UsageError

with without("rich"):
    import structlog  # noqa: F401  (without rich it imports in a tenth less time)
gc.freeze()  # nor are they searched later
gc.enable()

_VERBS = {
    "keepwarm": "run sweep validate submit worker collect status report compare export cancel "
    "keeper doctor",
    "prompt": "show",
    "broker": "setup",
    "dead": "list show retry drop",
    "contexts": "list warm evict logs prune",
}


class LazyGroup(TyperGroup):
    """A group that imports the module of a verb when the verb is used. Imports take time, and a
    worker must start within a second.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._verbs = _VERBS[attributes["name"]].split()
        self.commands = {**{verb: TyperCommand(verb) for verb in self._verbs}, **self.commands}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self._verbs:
            return _command(f"{self.name} {cmd_name}".removeprefix("keepwarm "))
        return super().get_command(ctx, cmd_name)


def _command(name: str) -> Any:
    """The command of a verb. A machine may lack the extras of services that it does not run."""
    words = name.split()
    gc.disable()
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

        return TyperCommand(
            words[-1],
            callback=unavailable,
            help=f"Not installed here: needs {missing}.",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
    finally:
        gc.freeze()
        gc.enable()
    function = getattr(module, words[-1])
    # Without line breaks in its paragraphs; the terminal's width sets them.
    paragraphs = (" ".join(text.split()) for text in (function.__doc__ or "").split("\n\n"))
    verb = typer.Typer(add_completion=False)
    verb.command(words[-1], help="\n\n".join(paragraphs))(function)
    return typer.main.get_command(verb)


app = typer.Typer(
    name="keepwarm",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Verify claims with language models on GPUs that come and go.\n\n"
        "[bold]keepwarm run FILE[/bold] verifies a file on one machine; "
        "[bold]validate FILE[/bold] checks the file first, [bold]prompt show[/bold] shows a claim "
        "as the model gets it, and [bold]sweep FILE[/bold] tries several prompts and models. On "
        "several machines, "
        "[bold]submit[/bold] publishes claims, [bold]worker[/bold] answers them, and "
        "[bold]collect[/bold] stores the verdicts. [bold]status[/bold], [bold]report[/bold], "
        "[bold]compare[/bold] and [bold]export[/bold] read the store. [bold]contexts[/bold] lists, "
        "starts and stops the engines of this node. [bold]broker setup[/bold] prepares a broker. "
        "[bold]doctor[/bold] checks a machine and reports how to fix problems.\n\n"
        "Settings are KEEPWARM_… environment variables (docs/settings.md); flags override them. "
        "Exit codes: 0 success, 1 a bug, 2 a bad flag or setting, 3 a bad file of claims or "
        "prompt, 4 no engine, 5 no broker, 6 no store or output, 7 some claims have no outcome "
        "yet, 8 the model hardly ever answers with a label word, 9 a message from a newer "
        "Keepwarm; [bold]run[/bold] and [bold]sweep[/bold] end with 130 or 143 when Ctrl-C or "
        "SIGTERM interrupts them."
    ),
)
for _name, _help in (
    ("prompt", "What a model gets from a prompt file."),
    ("broker", "Prepare a broker for a team."),
    ("dead", "Dead claims, and messages that no service could use."),
    ("contexts", "The engines of this node, which stay warm between workers and runs."),
):
    app.add_typer(typer.Typer(cls=LazyGroup, no_args_is_help=True, help=_help), name=_name)


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
    make_streams_robust()
    sys.argv[1:] = [_expand_home(argument) for argument in sys.argv[1:]]
    name_the_user()
    try:
        app()
    except KeepwarmError as error:
        print(printable(f"keepwarm: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error still sets the exit code


if __name__ == "__main__":
    main()
