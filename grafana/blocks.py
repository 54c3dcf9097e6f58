"""What all dashboards are made of: data source, variables, links, and panels of a few kinds."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# The variable that `board` gives to each dashboard: a Grafana that is there already has another
# Prometheus.
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "keepwarm"
WIDTH = 24
"""Of a dashboard, in Grafana's columns."""

_LATEST = common.ReduceDataOptions().calcs(["lastNotNull"])

Query = tuple[str, str]
"""PromQL, and the name of what it gives, which may have labels in {{…}}."""


def board(name: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty one, with links to the others that keep time and variables."""
    links = (
        dashboard.DashboardLink("Keepwarm")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .keep_time(True)
        .include_vars(True)
    )
    return (
        dashboard.Dashboard(f"Keepwarm: {title}")
        .uid(f"keepwarm-{name}")
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(links)
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """All values, unless somebody chooses some."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def context(info: str = "keepwarm_context_info") -> dashboard.QueryVariable:
    return variable("context", "Context", f"label_values({info}, context_id)")


def run(hide: models.VariableHide = models.VariableHide.HIDE_VARIABLE) -> dashboard.QueryVariable:
    """Hidden on dashboards without runs, where it only passes the value on through links."""
    query = 'label_values(keepwarm_run_info{context_id=~"$context"}, run_id)'
    return variable("run", "Run", query).hide(hide)


def once(expression: str, *labels: str) -> str:
    """What every collector tells of the same things, and each has its own series of: of several
    collectors on one store one is believed. `labels` are all that tell these things apart.
    """
    return f"max by ({', '.join(labels)}) ({expression})"


def number(
    title: str,
    expression: str,
    meaning: str,
    unit: str = "short",
    *,
    good: Sequence[tuple[float, str]] = (),
    width: int = 4,
    decimals: int | None = None,
) -> stat.Panel:
    """How it is now. `good` has colours from a value on, the first from the least value on."""
    panel = stat.Panel().graph_mode(kinds.BigValueGraphMode.NONE)
    panel = _common(panel, title, meaning, unit, width, 4)
    panel.with_target(_query(expression, "").instant()).reduce_options(_LATEST)
    panel.color_mode(kinds.BigValueColorMode.VALUE if good else kinds.BigValueColorMode.NONE)
    if good:
        (_, first), *others = good
        steps = [models.Threshold(value=None, color=first)]
        steps += [models.Threshold(value=value, color=colour) for value, colour in others]
        panel.thresholds(
            dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
        )
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def lines(
    title: str,
    queries: Sequence[Query],
    meaning: str,
    unit: str = "short",
    *,
    stacked: bool = False,
    width: int = 12,
) -> series.Panel:
    """How it went."""
    panel = _common(series.Panel(), title, meaning, unit, width, 8).min(0)
    panel.line_width(1).show_points(kinds.VisibilityMode.NEVER)
    panel.legend(
        common.VizLegendOptions()
        .display_mode(kinds.LegendDisplayMode.LIST)
        .placement(kinds.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    if stacked:
        panel.fill_opacity(40).stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if unit == "percentunit":
        panel.max(1)
    for ref_id, (expression, legend) in zip(ascii_uppercase, queries, strict=False):
        panel.with_target(_query(expression, legend).ref_id(ref_id))
    return panel


def bars(
    title: str, query: Query, meaning: str, unit: str = "short", *, width: int = 12
) -> bargauge.Panel:
    """How several things are now, beside each other."""
    panel = _common(bargauge.Panel(), title, meaning, unit, width, 8).min(0)
    panel.orientation(kinds.VizOrientation.HORIZONTAL)
    panel.display_mode(kinds.BarGaugeDisplayMode.BASIC).reduce_options(_LATEST)
    return panel.with_target(_query(*query).instant())


def rows(
    title: str, expression: str, meaning: str, columns: Sequence[str], *, width: int = WIDTH
) -> table.Panel:
    """A row for each series, with these of its labels."""
    panel = _common(table.Panel(), title, meaning, "short", width, 8)
    panel.with_target(_query(expression, "").instant().format(PromQueryFormat.TABLE))
    return panel.with_transformation(
        models.DataTransformerConfig(
            id_val="filterFieldsByName", options={"include": {"names": list(columns)}}
        )
    )


def _query(expression: str, legend: str) -> prometheus.Dataquery:
    query = prometheus.Dataquery().datasource(SOURCE).ref_id("A")
    return query.expr(expression).legend_format(legend)


def _common(panel: Any, title: str, meaning: str, unit: str, width: int, height: int) -> Any:
    panel.title(title).description(meaning).datasource(SOURCE).unit(unit)
    return panel.span(width).height(height)
