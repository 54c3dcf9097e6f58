"""The dashboard of runs: how far, how fast, how right."""

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
        board("run", "Run", "How far runs are, how fast they go, and how right they are so far.")
        .with_variable(blocks.context("keepwarm_run_info"))
        .with_variable(blocks.run(VariableHide.DONT_HIDE))
        .with_panel(
            number(
                "Progress",
                f"sum({_OUTCOMES} and on (run_id) {_CLAIMS}) / sum({_CLAIMS})",
                "Claims with an outcome, of all that there are, of runs whose claims are all sent.",
                "percentunit",
                decimals=1,
            )
        )
        .with_panel(
            number(
                "Left",
                f"max(keepwarm_run_left_seconds{{{_OF}}})",
                "Until the last of them is complete, at the present speed.",
                "dtdurations",
            )
        )
        .with_panel(
            number(
                "Claims a second",
                f"sum({_SPEED})",
                "Over the last minute in which verdicts came; complete runs do not count.",
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
                "Verdicts whose answer could not be read. More than a few: the prompt does not "
                "fit the model.",
                "percentunit",
                good=((0, "green"), (0.01, "orange"), (0.1, "red")),
                decimals=2,
            )
        )
        .with_panel(
            number(
                "Dead claims",
                f"sum({_DEAD})",
                "Claims that were given up on. `keepwarm dead list` says why.",
                good=((0, "green"), (1, "orange")),
            )
        )
        .with_panel(
            lines(
                "Progress",
                [(f"{_OUTCOMES} / {_CLAIMS}", "{{run_id}}")],
                "Claims with an outcome, of all that there are.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Claims a second",
                [(_SPEED, "{{run_id}}")],
                "Over the last minute in which verdicts of the run came.",
            )
        )
        .with_panel(
            lines(
                "Verdicts",
                [(f"sum by (label) ({_VERDICTS})", "{{label}}")],
                "By label, one upon the other.",
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
                "The share of each label in all verdicts.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Accuracy so far",
                [
                    (f"sum by (run_id) ({_RIGHT}) / sum by (run_id) ({_JUDGED})", "{{run_id}}"),
                ],
                "Runs with gold labels. The report has the interval.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Invalid",
                [
                    (f"sum by (run_id) ({_INVALID}) / sum by (run_id) ({_VERDICTS})", "{{run_id}}"),
                ],
                "The share of verdicts whose answer could not be read.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "What preemptions cost",
                [
                    (f"sum({_run('lost_claims')})", "computed again, at most"),
                    (f"sum({_run('returned_claims')})", "returned unharmed"),
                    (f"sum({_run('duplicate_verdicts')})", "verdicts that came twice"),
                ],
                "Claims. What was returned cost nothing.",
            )
        )
        .with_panel(
            rows(
                "Runs",
                _run("info", *_COLUMNS[1:]),
                "What each run is of.",
                _COLUMNS,
                width=12,
            )
        )
    )
