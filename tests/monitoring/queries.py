"""The queries of the dashboards and of the alert rules, and what they name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser
import yaml

from grafana.read import dashboards, panels, substituted
from tests.monitoring.prometheus import RULES


@dataclass(frozen=True)
class Query:
    """One query, and where it stands."""

    where: str
    expression: str
    instant: bool = True
    """It is asked how things are, and not how they went."""

    def names(self) -> set[str]:
        """Of every metric that it asks for, as PromQL's grammar has it."""
        found = []

        def note(node: Any) -> None:
            if isinstance(node, promql_parser.VectorSelector):
                found.append(node.name)

        promql_parser.walk(promql_parser.parse(self.expression), pre_visit=note)
        assert found and all(found), f"{self.where}: a query of no name, or of any"
        return set(found)

    def aggregations(self) -> list[tuple[str, list[Any]]]:
        """The name of each metric that it asks for, and what it is aggregated by, from within."""
        found, around = [], []

        def enter(node: Any) -> None:
            if isinstance(node, promql_parser.AggregateExpr):
                around.insert(0, node)
            if isinstance(node, promql_parser.VectorSelector):
                found.append((str(node.name), list(around)))

        def leave(node: Any) -> None:
            if isinstance(node, promql_parser.AggregateExpr):
                around.pop(0)

        promql_parser.walk(promql_parser.parse(self.expression), pre_visit=enter, post_visit=leave)
        return found


def panel_queries(variables: Mapping[str, str]) -> list[Query]:
    return [
        Query(
            f"{dashboard['title']}: {panel['title']}",
            substituted(target["expr"], variables),
            instant=target.get("instant", False),
        )
        for dashboard in dashboards()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def rule_queries() -> list[Query]:
    return [Query(rule["alert"], rule["expr"]) for rule in rules()]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]
