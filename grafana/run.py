"""The dashboard of runs: how far, how fast, how right."""

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models.dashboard import VariableHide

from grafana import blocks
from grafana.blocks import bars, board, lines, number, rows

_OF = 'run_id=~"$run"'
_UNDER_WAY = f"(1 - keepwarm_run_complete{{{_OF}}})"
_OUTCOMES = f"(keepwarm_run_done_claims{{{_OF}}} + keepwarm_run_dead_claims{{{_OF}}})"
_INVALID = f'keepwarm_run_verdicts{{{_OF},label="INVALID"}}'
_RIGHT = f'keepwarm_run_gold_verdicts{{{_OF},correct="true"}}'


def run() -> Dashboard:
    return (
        board("run", "Run", "How far runs are, how fast they go, and how right they are so far.")
        .with_variable(blocks.context("keepwarm_run_info"))
        .with_variable(blocks.run(VariableHide.DONT_HIDE))
        .with_panel(
            number(
                "Progress",
                f"sum({_OUTCOMES}) / sum(keepwarm_run_claims{{{_OF}}})",
                "Claims with an outcome, of all that there are. Empty until all are sent.",
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
                f"sum(keepwarm_run_claims_per_second{{{_OF}}} * {_UNDER_WAY})",
                "Over the last minute in which verdicts came; complete runs do not count.",
                decimals=1,
            )
        )
        .with_panel(
            number(
                "Accuracy so far",
                f"sum({_RIGHT}) / sum(keepwarm_run_gold_verdicts{{{_OF}}})",
                "Of the claims with a verdict and a gold label. INVALID is wrong.",
                "percentunit",
                decimals=1,
            )
        )
        .with_panel(
            number(
                "Invalid",
                f"sum({_INVALID}) / sum(keepwarm_run_verdicts{{{_OF}}})",
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
                f"sum(keepwarm_run_dead_claims{{{_OF}}})",
                "Claims that were given up on. `keepwarm dead list` says why.",
                good=((0, "green"), (1, "orange")),
            )
        )
        .with_panel(
            lines(
                "Progress",
                [(f"{_OUTCOMES} / keepwarm_run_claims{{{_OF}}}", "{{run_id}}")],
                "Claims with an outcome, of all that there are.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Claims a second",
                [(f"keepwarm_run_claims_per_second{{{_OF}}} * {_UNDER_WAY}", "{{run_id}}")],
                "Over the last minute in which verdicts of the run came.",
            )
        )
        .with_panel(
            lines(
                "Verdicts",
                [(f"sum by (label) (keepwarm_run_verdicts{{{_OF}}})", "{{label}}")],
                "By label, one upon the other.",
                stacked=True,
            )
        )
        .with_panel(
            bars(
                "Verdict mix",
                (
                    f"sum by (label) (keepwarm_run_verdicts{{{_OF}}})"
                    f" / ignoring (label) group_left () sum(keepwarm_run_verdicts{{{_OF}}})",
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
                    (
                        f"sum by (run_id) ({_RIGHT})"
                        f" / sum by (run_id) (keepwarm_run_gold_verdicts{{{_OF}}})",
                        "{{run_id}}",
                    )
                ],
                "Runs with gold labels. The report has the interval.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Invalid",
                [
                    (
                        f"sum by (run_id) ({_INVALID})"
                        f" / sum by (run_id) (keepwarm_run_verdicts{{{_OF}}})",
                        "{{run_id}}",
                    )
                ],
                "The share of verdicts whose answer could not be read.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "What preemptions cost",
                [
                    (f"sum(keepwarm_run_lost_claims{{{_OF}}})", "computed again, at most"),
                    (f"sum(keepwarm_run_returned_claims{{{_OF}}})", "returned unharmed"),
                    (f"sum(keepwarm_run_duplicate_verdicts{{{_OF}}})", "verdicts that came twice"),
                ],
                "Claims. What was returned cost nothing.",
            )
        )
        .with_panel(
            rows(
                "Runs",
                f"keepwarm_run_info{{{_OF}}}",
                "What each run is of.",
                ("run_id", "source", "model", "prompt", "context_id"),
                width=12,
            )
        )
    )
