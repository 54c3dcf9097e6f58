"""What panels show where two collectors, on one store, tell of the same things."""

import json
from pathlib import Path

import pytest

from grafana.read import dashboards, panels, substituted
from tests.monitoring.test_rules import promtool

VARIABLES = {"context": ".*", "run": ".*", "__range": "10m"}
TOLD_BY_EACH = {
    'keepwarm_workers{state="serving",device="T4"%s}': "2x15",
    'keepwarm_context_workers{context_id="ctx-1"%s}': "2x15",
    'keepwarm_context_ready_claims{context_id="ctx-1"%s}': "640x15",
    'keepwarm_preemptions_total{kind="SIGTERM"%s}': "0x5 3x10",
    'keepwarm_preemptions_total{kind="SIGINT"%s}': "0x5 1x10",
    'keepwarm_run_claims{run_id="run-1"%s}': "80x15",
    'keepwarm_run_done_claims{run_id="run-1"%s}': "50x15",
    'keepwarm_run_dead_claims{run_id="run-1"%s}': "2x15",
    'keepwarm_run_verdicts{run_id="run-1",label="A"%s}': "40x15",
    'keepwarm_run_verdicts{run_id="run-1",label="INVALID"%s}': "10x15",
    'keepwarm_run_gold_verdicts{run_id="run-1",correct="true"%s}': "30x15",
    'keepwarm_run_gold_verdicts{run_id="run-1",correct="false"%s}': "10x15",
    'keepwarm_run_claims_per_second{run_id="run-1"%s}': "7x15",
    'keepwarm_run_complete{run_id="run-1"%s}': "0x15",
    # One that is still being submitted: nobody knows how many claims it has.
    'keepwarm_run_done_claims{run_id="run-2"%s}': "30x15",
    'keepwarm_run_dead_claims{run_id="run-2"%s}': "1x15",
    'keepwarm_run_complete{run_id="run-2"%s}': "0x15",
}
SHOWN = {
    ("fleet", "Workers serving"): 2,
    ("fleet", "Warm contexts"): 1,
    ("fleet", "Claims waiting"): 640,
    ("fleet", "Preemptions"): 3,
    ("run", "Progress"): 0.65,
    ("run", "Claims per second"): 7,
    ("run", "Accuracy so far"): 0.75,
    ("run", "Invalid"): 0.2,
    ("run", "Dead claims"): 3,
}


@pytest.mark.parametrize(("dashboard", "title"), SHOWN)
def test_a_number_is_the_same_with_two_collectors(
    dashboard: str, title: str, tmp_path: Path
) -> None:
    (expression,) = (
        panel["targets"][0]["expr"]
        for each in dashboards()
        for panel in panels(each)
        if (each["uid"], panel["title"], panel["type"]) == (f"keepwarm-{dashboard}", title, "stat")
    )
    story = {
        "interval": "1m",
        "input_series": [
            {"series": series % f',instance="{collector}:9464"', "values": values}
            for series, values in TOLD_BY_EACH.items()
            for collector in ("a", "b")
        ],
        "promql_expr_test": [
            {
                "expr": substituted(expression, VARIABLES),
                "eval_time": "12m",
                "exp_samples": [{"labels": "{}", "value": SHOWN[dashboard, title]}],
            }
        ],
    }
    file = tmp_path / "story.yml"
    file.write_text(json.dumps({"tests": [story]}), encoding="utf-8")  # which is YAML, too
    promtool("test", "rules", file)
