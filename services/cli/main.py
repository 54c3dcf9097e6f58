"""The command's front door: verbs, and what every one of them does with an error."""

import sys

import typer

from services.cli import collect, export, report, run, status, submit, worker
from services.contracts import KeepwarmError

app = typer.Typer(
    name="keepwarm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Verify claims with language models on GPUs that come and go.\n\n"
        "[bold]keepwarm run FILE[/bold] does it all on one machine. The other verbs are its parts: "
        "[bold]submit[/bold] publishes claims, [bold]worker[/bold] answers them, "
        "[bold]collect[/bold] stores the verdicts; [bold]status[/bold], [bold]report[/bold] and "
        "[bold]export[/bold] read the store.\n\n"
        "Settings come from KEEPWARM_… variables (docs/settings.md); flags win. Exit codes: "
        "0 well, 1 a bug, 2 a bad flag or setting, 3 a bad file of claims or prompt, 4 no engine, "
        "5 no broker, 6 no store or output, 7 some claims have no outcome yet, 130 and 143 stopped "
        "by Ctrl-C and SIGTERM."
    ),
)
app.command("run")(run.run)
app.command("submit")(submit.submit)
app.command("worker")(worker.worker)
app.command("collect")(collect.collect)
app.command("status")(status.status)
app.command("report")(report.report)
app.command("export")(export.export)


def main() -> None:
    try:
        app()
    except KeepwarmError as error:
        print(f"keepwarm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output, `head` for instance, has had enough.
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
