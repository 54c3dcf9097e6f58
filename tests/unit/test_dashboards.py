"""The dashboard files: generated from the code, complete, and of existing metrics."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana.blocks import SOURCE, TAG
from grafana.read import dashboards, panels, substituted
from tests.monitoring.queries import Query, panel_queries, rule_queries
from tests.unit.test_metrics import GAUGES, METRICS

VARIABLES = {"context": ".*", "run": ".*", "__rate_interval": "1m", "__range": "1h"}
EXPORTED_BY_EVERY_COLLECTOR = {
    metric.name: set(metric.labels)
    for metric in METRICS
    if metric.name in {"keepwarm_preemptions_total", *(family.name for family in GAUGES.describe())}
}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def test_the_files_are_generated_from_the_code(repository: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "grafana.make", "--check"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    "query", [*panel_queries(VARIABLES), *rule_queries()], ids=lambda query: query.where
)
def test_a_query_uses_only_metrics_that_exist(query: Query) -> None:
    known = {metric.name + suffix for metric in METRICS for suffix in SUFFIXES[metric.type]}
    ours = {name for name in query.names() if name.startswith("keepwarm")}
    assert ours <= known
    assert all(name.startswith(("rabbitmq_", "up")) for name in query.names() - ours)


@pytest.mark.parametrize(
    "query", [*panel_queries(VARIABLES), *rule_queries()], ids=lambda query: query.where
)
def test_metrics_of_every_collector_are_not_summed_over_collectors(query: Query) -> None:
    """Two collectors on one store export the same values: the maximum is taken, by all labels if
    it is aggregated further.
    """
    for name, aggregations in query.aggregations():
        if name in EXPORTED_BY_EVERY_COLLECTOR:
            assert [str(each.op) for each in aggregations[:1]] == ["max"], name
            if len(aggregations) > 1:
                assert set(aggregations[0].modifier.labels) == EXPORTED_BY_EVERY_COLLECTOR[name], (
                    name
                )


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda each: each["uid"])
def test_a_dashboard_is_complete(dashboard: dict[str, Any]) -> None:
    shown = list(panels(dashboard))
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        assert panel["title"] and panel["description"].endswith(".")
        letters = [target["refId"] for target in panel["targets"]]
        assert all(letters) and len(set(letters)) == len(letters)
        for source in (panel["datasource"], *(each["datasource"] for each in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    source, *others = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert [each["name"] for each in others] == ["context", "run"]
    assert all(each["datasource"]["uid"] == "${datasource}" for each in others)
    (link,) = dashboard["links"]
    assert TAG in dashboard["tags"] and link["tags"] == [TAG]
    assert link["includeVars"] and link["keepTime"]


def test_panels_do_not_overlap() -> None:
    for dashboard in dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in panels(dashboard):
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert not cells & taken and max(x for x, _ in cells) < 24
            taken |= cells


def test_grafana_is_given_a_source_of_the_kind_that_they_ask_for(repository: Path) -> None:
    provisioning = repository / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == SOURCE.type_val and source["isDefault"]
    scrapes = yaml.safe_load((repository / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrapes["global"]["scrape_interval"]


def test_a_variable_without_a_value_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("$range")):
        substituted("rate(x[$range])", {})
