"""The dashboard of runs: progress, speed, accuracy."""

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models.dashboard import VariableHide

from grafana import blocks
from grafana.blocks import bars, board, lines, number, once, rows

_OF = 'run_id=~"$run"'


def _run(what: str, *labels: str, where: str = "") -> str:
    return once(f"keepwarm_run_{what}{{{_OF}{where}}}", "run_id", *labels)


_CLAIMS = _run("claims")
_DEAD = _run("dead_claims")
_OUTCOMES = f"({_run('done_claims')} + {_DEAD})"
_SPEED = f"{_run('claims_per_second')} * (1 - {_run('complete')})"
_VERDICTS = _run("verdicts", "label")
_INVALID = _run("verdicts", "label", where=',label="INVALID"')
_JUDGED = _run("gold_verdicts", "correct")
_RIGHT = _run("gold_verdicts", "correct", where=',correct="true"')
_COLUMNS = ("run_id", "source", "model", "prompt", "context_id")


def run() -> Dashboard:
    return (
        board("run", "Run", "Progress, speed and accuracy of runs.")
        .with_variable(blocks.context("keepwarm_run_info"))
        .with_variable(blocks.run(VariableHide.DONT_HIDE))
        .with_panel(
            number(
                "Progress",
                f"sum({_OUTCOMES} and on (run_id) {_CLAIMS}) / sum({_CLAIMS})",
                "Share of claims with an outcome, in runs whose claims are all sent.",
                "percentunit",
                decimals=1,
            )
        )
        .with_panel(
            number(
                "Time left",
                f"max(keepwarm_run_left_seconds{{{_OF}}})",
                "Time until the last run is complete, at the current speed.",
                "dtdurations",
            )
        )
        .with_panel(
            number(
                "Claims per second",
                f"sum({_SPEED})",
                "Over the last minute with verdicts, without complete runs.",
                decimals=1,
            )
        )
        .with_panel(
            number(
                "Accuracy so far",
                f"sum({_RIGHT}) / sum({_JUDGED})",
                "Of the claims with a verdict and a gold label. INVALID is wrong.",
                "percentunit",
                decimals=1,
            )
        )
        .with_panel(
            number(
                "Invalid",
                f"sum({_INVALID}) / sum({_VERDICTS})",
                "Verdicts whose answer could not be read. If there are many, the prompt does "
                "not fit the model.",
                "percentunit",
                good=((0, "green"), (0.01, "orange"), (0.1, "red")),
                decimals=2,
            )
        )
        .with_panel(
            number(
                "Dead claims",
                f"sum({_DEAD})",
                "Claims without a verdict. `keepwarm dead list` shows the reasons.",
                good=((0, "green"), (1, "orange")),
            )
        )
        .with_panel(
            lines(
                "Progress",
                [(f"{_OUTCOMES} / {_CLAIMS}", "{{run_id}}")],
                "Share of claims with an outcome.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Claims per second",
                [(_SPEED, "{{run_id}}")],
                "Over the last minute with verdicts of the run.",
            )
        )
        .with_panel(
            lines(
                "Verdicts",
                [(f"sum by (label) ({_VERDICTS})", "{{label}}")],
                "By label, stacked.",
                stacked=True,
            )
        )
        .with_panel(
            bars(
                "Verdict mix",
                (
                    f"sum by (label) ({_VERDICTS})"
                    f" / ignoring (label) group_left () sum({_VERDICTS})",
                    "{{label}}",
                ),
                "Share of each label in all verdicts.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Accuracy so far",
                [
                    (f"sum by (run_id) ({_RIGHT}) / sum by (run_id) ({_JUDGED})", "{{run_id}}"),
                ],
                "Runs with gold labels. The report has the confidence interval.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Invalid",
                [
                    (f"sum by (run_id) ({_INVALID}) / sum by (run_id) ({_VERDICTS})", "{{run_id}}"),
                ],
                "Share of verdicts whose answer could not be read.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Cost of preemptions",
                [
                    (f"sum({_run('lost_claims')})", "computed again, at most"),
                    (f"sum({_run('returned_claims')})", "returned"),
                    (f"sum({_run('duplicate_verdicts')})", "duplicate verdicts"),
                ],
                "Claims. Returned claims cost no work.",
            )
        )
        .with_panel(
            rows(
                "Runs",
                _run("info", *_COLUMNS[1:]),
                "Source, model and prompt of each run.",
                _COLUMNS,
                width=12,
            )
        )
    )
